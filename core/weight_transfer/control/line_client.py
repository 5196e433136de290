"""The trainer's end of a line; all of it happens on the event loop. See `weight_transfer.control.line`."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

import h11

from weight_transfer.control.http_requests import Answer
from weight_transfer.control.line import HELLO, WAITS, Messages
from weight_transfer.errors import PeerLostError, TransferTimeoutError

_IDLE = 30  # seconds after which the kernel asks whether the other end is still there, so that no firewall forgets it
_ASKS = 4  # in vain, before it counts as gone
_INTERVAL = 10  # seconds between them


Answered = Callable[[Answer | BaseException], None]


class NoLine(Exception):  # noqa: N818  (an answer, not a failure)
    """The server does not open a line."""


class Line(asyncio.Protocol):
    """One connection, from `open` until it is closed, or lost.

    Attributes:
        is_open: whether calls may be made.
        waits: whether an update may have to wait for somebody who samples.
    """

    def __init__(self, head: h11.Request, where: str) -> None:
        self.is_open = False
        self.waits = False
        self._head = head
        self._where = where
        self._http = h11.Connection(h11.CLIENT)
        self._messages = Messages()
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[Answered, dict[str, Any], asyncio.TimerHandle]] = {}
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, host: str, port: int, target: str, headers: Sequence[tuple[str, str]], tls: Any, seconds: float
    ) -> Line:
        """Connect, and wait until the server says that it takes calls.

        Args:
            host: to connect to.
            port: there.
            target: the path.
            headers: of the request.
            tls: the SSL context; None for none.
            seconds: that connecting may take, and then the server's first word.

        Raises:
            NoLine: the server, or a proxy before it, answered something else, or nothing.
            OSError: connecting failed, or the connection broke.
        """
        head = h11.Request(method="POST", target=target, headers=[*headers, ("Transfer-Encoding", "chunked")])
        where = f"{host} port {port}"
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            _, line = await loop.create_connection(lambda: cls(head, where), host, port, ssl=tls)
        try:
            async with asyncio.timeout(seconds):
                await line.greeting()
        except TimeoutError as error:
            line.close()
            raise NoLine(f"{where} said nothing within {seconds:.1f} s") from error
        except BaseException:
            line.close()
            raise
        return line

    async def greeting(self) -> None:
        """Wait until the server says that it takes calls; raises what `open` does."""
        await self._greeted

    def ask(self, call: str, body: bytes, seconds: float, where: dict[str, Any], answered: Answered) -> None:
        """Make a call.

        Args:
            call: name of the route.
            body: JSON.
            seconds: that it may take.
            where: fields of errors.
            answered: called once with the answer; or with TransferTimeoutError, or PeerLostError if the connection is
                lost.
        """
        number = next(self._numbers)
        late = asyncio.get_running_loop().call_later(seconds, self._late, number, call, seconds)
        self._calls[number] = answered, where, late
        self._write(h11.Data(data=b'{"id":%d,"call":"%s","body":%s}\n' % (number, call.encode(), body)))

    def close(self) -> None:
        """Close the connection; calls that are under way are lost."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()  # under TLS, close would wait for the other end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _INTERVAL), ("TCP_KEEPCNT", _ASKS)):
            if hasattr(socket, name):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._write(self._head)

    def data_received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    for message in self._messages.feed(bytes(event.data)):
                        self._take(message)
                elif isinstance(event, h11.Response) and event.status_code != 200:
                    self._refuse(f"HTTP status {event.status_code}")
                elif isinstance(event, h11.EndOfMessage):
                    self.close()
                elif event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                    break
        except (h11.ProtocolError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._refuse(f"something else: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        cause = f"{type(error).__name__}: {error}" if error is not None else "the connection was closed"
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionResetError(cause))
        calls, self._calls = self._calls, {}
        for answered, where, late in calls.values():
            late.cancel()
            answered(PeerLostError("The worker cannot be reached, or went away.", cause=cause, **where))

    def _take(self, message: bytes) -> None:
        if not self._greeted.done():
            if message != HELLO:
                raise ValueError("it does not begin as a line does")
            self.is_open = True
            self._greeted.set_result(None)
            return
        if message == WAITS:
            self.waits = True
            return
        data = json.loads(message)
        call = self._calls.pop(data["id"], None)
        if call is not None:  # else it was given up
            answered, _, late = call
            late.cancel()
            answered(Answer(data["status"], data["body"]))

    def _refuse(self, what: str) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(NoLine(f"{self._where} answered with {what}"))
        self.close()

    def _late(self, number: int, call: str, seconds: float) -> None:
        answered, where, _ = self._calls.pop(number)
        answered(TransferTimeoutError(f"The worker did not answer /{call} within {seconds:.1f} s.", **where))

    def _write(self, event: h11.Request | h11.Data) -> None:
        data = self._http.send(event)
        if self._transport is not None and data:
            self._transport.write(data)
