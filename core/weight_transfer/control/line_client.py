"""The trainer's end of a line; see `weight_transfer.control.line`."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import attrs
import h11

from weight_transfer.control.http_requests import Answer
from weight_transfer.control.line import HELLO, WAITS, Chunks, Messages, framed
from weight_transfer.control.line_wires import PlainWire, Wire, connect
from weight_transfer.errors import PeerLostError, TransferTimeoutError

Answered = Callable[[Answer | Exception], None]


class NoLine(Exception):  # noqa: N818  (an answer, not a failure)
    """The server does not open a line."""


class Line:
    """One connection, from `open` until it is closed, or lost. Opened on the event loop, it is used from any thread.

    Attributes:
        is_open: whether calls may be made.
        waits: whether an update may have to wait for somebody who samples.
    """

    def __init__(self, where: str) -> None:
        self.is_open = False
        self.waits = False
        self._where = where
        self._http: h11.Connection | None = h11.Connection(h11.CLIENT)
        self._chunks, self._messages = Chunks(), Messages()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._next_look = inf
        self._timer: asyncio.TimerHandle | None = None
        self._wire: Wire

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
        line = cls(f"{host} port {port}")
        async with asyncio.timeout(seconds):
            line._wire = await connect(host, port, tls, line._receive, line._lose)
        try:
            assert line._http is not None
            line._wire.write(line._http.send(head) or b"")
            async with asyncio.timeout(seconds):
                await line._greeted
        except TimeoutError as error:
            line.close()
            raise NoLine(f"{line._where} said nothing within {seconds:.1f} s") from error
        except BaseException:
            line.close()
            raise
        return line

    @property
    def socket(self) -> PlainWire | None:
        """What whoever waits for an answer may read himself; None if the event loop alone can."""
        return self._wire if isinstance(self._wire, PlainWire) else None

    def ask(self, call: str, body: bytes, seconds: float, where: dict[str, Any], answered: Answered) -> None:
        """Make a call.

        Args:
            call: name of the route.
            body: JSON.
            seconds: that it may take.
            where: fields of errors.
            answered: called once, on whichever thread knows it first, with the answer; or with TransferTimeoutError, or
                PeerLostError if the connection is lost.
        """
        asked = _Call(call, seconds, where, answered)
        with self._lock:
            if self.is_open:
                number = next(self._numbers)
                self._calls[number] = asked
                is_next, self._next_look = asked.end < self._next_look, min(asked.end, self._next_look)
            else:
                number, is_next = 0, False
        if not number:
            answered(_lost("the connection was closed", where))
            return
        self._wire.write(framed(b'{"id":%d,"call":"%s","body":%s}' % (number, call.encode(), body)))
        if is_next:  # which is rare: mostly a look is due before the time of this call is up
            self._loop.call_soon_threadsafe(self._plan_look)

    def note(self, call: str, body: bytes) -> None:
        """Make a call that has no answer; it is lost if the connection is.

        Args:
            call: name of the route.
            body: JSON.
        """
        self._wire.write(framed(b'{"call":"%s","body":%s}' % (call.encode(), body)))

    def close(self) -> None:
        """Close the connection; calls that are under way are lost."""
        self.is_open = False
        self._wire.close()

    def _receive(self, data: bytes) -> None:
        try:
            body = data if self._http is None else self._after_head(self._http, data)
            for part in self._chunks.feed(body):
                for message in self._messages.feed(part):
                    self._take(message)
        except (h11.ProtocolError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._refuse(f"something else: {error}")
        if self._chunks.ended:
            self.close()

    def _after_head(self, http: h11.Connection, data: bytes) -> bytes:
        """Read the head of the answer; return what has come of the body."""
        http.receive_data(data)
        event = http.next_event()
        while isinstance(event, h11.InformationalResponse):
            event = http.next_event()
        if not isinstance(event, h11.Response):  # it has not come yet
            return b""
        if event.status_code != 200:
            self._refuse(f"HTTP status {event.status_code}")
        elif (b"transfer-encoding", b"chunked") not in event.headers:
            self._refuse("a body that does not come in chunks")
        else:
            self._http = None
            return http.trailing_data[0]
        return b""

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
        data = json.loads(message.decode())
        with self._lock:
            call = self._calls.pop(data["id"], None)
        if call is not None:  # else it was given up
            call.answered(Answer(data["status"], data["body"]))

    def _refuse(self, what: str) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(NoLine(f"{self._where} answered with {what}"))
        self.close()

    def _lose(self, error: Exception | None) -> None:
        """Nothing will come any more; on the event loop."""
        cause = f"{type(error).__name__}: {error}" if error is not None else "the connection was closed"
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionResetError(cause))
        with self._lock:
            self.is_open = False
            calls, self._calls = self._calls, {}
            if self._timer is not None:
                self._timer.cancel()
        for call in calls.values():
            call.answered(_lost(cause, call.where))

    def _plan_look(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(max(0, self._next_look - time.monotonic()), self._look)

    def _look(self) -> None:
        """Give up the calls whose time is up, and look again when that of another one is; on the event loop."""
        now = time.monotonic()
        with self._lock:
            late = {number: call for number, call in self._calls.items() if call.end <= now}
            for number in late:
                del self._calls[number]
            self._next_look = min((call.end for call in self._calls.values()), default=inf)
        if self._next_look < inf:
            self._plan_look()
        for call in late.values():
            message = f"The worker did not answer /{call.name} within {call.seconds:.1f} s."
            call.answered(TransferTimeoutError(message, **call.where))


@attrs.frozen(eq=False)
class _Call:
    """A call that waits for its answer; ``end`` is when its time is up, on the monotonic clock."""

    name: str
    seconds: float
    where: dict[str, Any]
    answered: Answered
    end: float = attrs.field(init=False)

    @end.default
    def _until(self) -> float:
        return time.monotonic() + self.seconds


def _lost(cause: str, where: dict[str, Any]) -> PeerLostError:
    return PeerLostError("The worker cannot be reached, or went away.", cause=cause, **where)
