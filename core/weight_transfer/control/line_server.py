"""The worker's end of a line; see `weight_transfer.control.line`.

It is offered by `Server` alone. A line never ends by itself, so a server that waits at its end for open requests would
wait for ever: it has to tell them, which ASGI has no word for. `Server` does it by the connection in the scope.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from weight_transfer.control.direct_writer import DirectWriter, own_socket
from weight_transfer.control.kept_threads import KeptThreads
from weight_transfer.control.line import CONTENT_TYPE, HELLO, WAITS, Messages, framed
from weight_transfer.errors import TransferError, error_to_dict

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from weight_transfer.control.http_connections import Connection
    from weight_transfer.control.serving_calls import ServedCalls

logger = logging.getLogger(__name__)

THREADS = KeptThreads("weight-transfer worker call")
PASSES = 4
"""Of the event loop, in which it notices that a connection was closed before a call has ended."""
_LOOK = 0.1  # seconds
_GOODBYE = 2.0  # seconds in which whoever is at the other end has to read what was sent
_MOST_CALLS = 256  # that are under way, or whose answers nobody reads


class ServedLine:
    """One line, from the request that opened it, which the guard has let in, until either side closes it.

    Calls run on threads that are kept, which write the answers themselves; under TLS the event loop does. Those that
    are under way when the trainer's end is gone are aborted as those of requests are.

    Args:
        calls: answers them.
        scope: of the request.
        receive: of the request.
        send: of the request.
        max_bytes: of one call.
    """

    def __init__(self, calls: ServedCalls, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self._calls = calls
        self._max_bytes = max_bytes
        self._request = Request(scope, receive)
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[int, dict[str, Any] | None] = {}
        self._numbers = itertools.count()
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._writer: DirectWriter | None = None
        self._has_left = False

    async def run(self, connection: Connection) -> None:
        """Answer calls until the trainer closes the line, or the server ends."""
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"connection", b"close")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._writer = _writer_beside(connection, self._loop)
        self._say(HELLO)
        forget = self._calls.when_sampled(partial(self._say, WAITS))
        tasks = [self._loop.create_task(work) for work in (self._listen(), self._speak(), _wait(connection.ending))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            while self._under_way and not self._has_left:
                await asyncio.wait(tasks[:1], timeout=_LOOK)  # the server waits for them a moment, then cancels this
        finally:
            forget()
            for task in tasks:
                task.cancel()
            if self._writer is not None:
                self._writer.close()
        self._loop.call_later(_GOODBYE, connection.transport.abort)  # it may be that nobody reads
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _listen(self) -> None:
        """Take calls until the trainer ends the line."""
        messages = Messages(self._max_bytes)
        goes_on = True
        while goes_on:
            event = await self._request.receive()
            goes_on = event["type"] == "http.request" and event.get("more_body", False)
            try:
                for message in messages.feed(event.get("body", b"")):
                    self._begin(json.loads(message))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                logger.warning("closed a line on which something else than calls came: %s", error)
                break
        self._has_left = True
        for body in self._under_way.values():
            if body is not None:
                THREADS.run(partial(self._calls.abort, body))

    def _say(self, message: bytes) -> None:
        """Send an answer, or what the server says of itself; from any thread."""
        if self._writer is not None:
            self._writer.write(framed(message))
            return
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._answers.put_nowait, message)

    async def _speak(self) -> None:
        """Send what the event loop has to send."""
        while True:
            message = await self._answers.get()
            await self._send({"type": "http.response.body", "body": message + b"\n", "more_body": True})

    def _begin(self, data: dict[str, Any]) -> None:
        call, name, body = data["id"], data["call"], data["body"]
        number = next(self._numbers)
        if not isinstance(body, dict):
            raise TypeError("the body of a call is a table")
        aborts = name in self._calls.offers and self._calls.offers[name].aborts
        unsent = self._answers.qsize() + (self._writer.left if self._writer is not None else 0)
        if len(self._under_way) + unsent >= _MOST_CALLS:
            raise ValueError(f"more than {_MOST_CALLS} calls at once")
        self._under_way[number] = body if aborts else None
        THREADS.run(partial(self._perform, number, call, name, body))

    def _perform(self, number: int, call: object, name: str, body: dict[str, Any]) -> None:
        """Make a call, on a thread."""
        status, answer = self._calls.perform(name, body) if name in self._calls.offers else (404, None)
        try:
            text = json.dumps({"id": call, "status": status, "body": answer}, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            failed = error_to_dict(TransferError(f"The answer to /{name} is not JSON-safe.", cause=str(error)))
            text = json.dumps({"id": call, "status": 500, "body": {"error": failed}})
        self._say(text.encode())
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._forget, number, PASSES)

    def _forget(self, number: int, passes: int) -> None:
        """Let go of a call once its answer has gone out to somebody."""
        if passes and not self._has_left:
            self._loop.call_soon(self._forget, number, passes - 1)
        else:
            self._under_way.pop(number, None)


def _writer_beside(connection: Connection, loop: asyncio.AbstractEventLoop) -> DirectWriter | None:
    """Return what writes to a connection from any thread; None under TLS, or if something has not gone out yet.

    From then on nothing may be written in another way, but for the end.
    """
    transport = connection.transport
    if transport.get_extra_info("ssl_object") is not None or transport.get_write_buffer_size():
        return None
    return DirectWriter(own_socket(transport), loop)


async def _wait(ending: asyncio.Event) -> None:
    await ending.wait()
