"""The worker's end of a line; see `weight_transfer.control.line`.

It is offered by `Server` alone. A line never ends by itself, so a server that waits at its end for open requests would
wait for ever: it has to tell them, which ASGI has no word for. `Server` does it by the connection in the scope.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from starlette.requests import Request

from weight_transfer.config.structuring import brief
from weight_transfer.control.direct_writer import DirectWriter, own_socket
from weight_transfer.control.kept_threads import KeptThreads
from weight_transfer.control.line import CONTENT_TYPE, HELLO, WAITS, Chunks, Messages, framed
from weight_transfer.errors import TransferError, error_to_dict
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from weight_transfer.control.http_connections import Connection
    from weight_transfer.control.serving_calls import ServedCalls

logger = logging.getLogger(__name__)

THREADS = KeptThreads("weight-transfer worker call")
PASSES = 4
"""Of the event loop, in which it notices that a connection was closed before a call has ended."""
_LOOK = 0.1  # seconds
_GOODBYE = 2.0  # seconds in which whoever is at the other end has to read what was sent
_LONG = 2e-3  # seconds that a call takes at most, for nobody to take the next one meanwhile
_MOST_CALLS = 256  # that are under way, or whose answers nobody reads
_PIECE = 2**18  # bytes that are read at once
_HUNG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)
_JSON = json.JSONEncoder(separators=(",", ":"))
_NO_CALL = (ValueError, TypeError, KeyError, RecursionError)


class ServedLine:
    """One line, from the request that opened it, which the guard has let in, until either side closes it.

    Calls run on threads that are kept, which read the calls and write the answers themselves; under TLS the event loop
    does. Those that are under way when the trainer's end is gone are aborted as those of requests are.

    Args:
        calls: answers them.
        scope: of the request.
        receive: of the request.
        send: of the request.
        max_bytes: of one call.
    """

    def __init__(self, calls: ServedCalls, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self._calls = calls
        self._messages = Messages(max_bytes)
        self._request = Request(scope, receive)
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[int, dict[str, Any] | None] = {}
        self._numbers = itertools.count()
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._beside: _Beside | None = None
        self._has_left = self._is_over = False

    async def run(self, connection: Connection) -> None:
        """Answer calls until the trainer closes the line, or the server ends."""
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"connection", b"close")]
        connection.flow.pause_reading()  # the trainer says nothing before it has heard the first word
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._beside = _Beside.of(connection, self._request, self._loop)
        if self._beside is None:
            connection.flow.resume_reading()
        self._say(HELLO)
        forget = self._calls.when_sampled(partial(self._say, WAITS))
        listen = self._listen() if self._beside is None else self._listen_beside(self._beside)
        tasks = [self._loop.create_task(work) for work in (listen, self._speak(), _wait(connection.ending))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            while self._under_way and not self._has_left:
                await asyncio.wait(tasks[:1], timeout=_LOOK)  # the server waits for them a moment, then cancels this
        finally:
            forget()
            self._is_over = True
            for task in tasks:
                task.cancel()
            if self._beside is not None:
                self._beside.close()
        self._loop.call_later(_GOODBYE, connection.transport.abort)  # it may be that nobody reads
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _listen(self) -> None:
        """Take calls until the trainer ends the line."""
        goes_on = True
        while goes_on:
            event = await self._request.receive()
            goes_on = event["type"] == "http.request" and event.get("more_body", False)
            try:
                for message in self._messages.feed(event.get("body", b"")):
                    THREADS.run(self._admitted(message))
            except _NO_CALL as error:
                _warn(error)
                break
        self._leave()

    async def _listen_beside(self, beside: _Beside) -> None:
        """Have threads take calls until the trainer ends the line."""
        left = asyncio.Event()

        def leave() -> None:
            beside.end()
            if not self._is_over:
                self._leave()
                with suppress(RuntimeError):  # the server has ended meanwhile
                    self._loop.call_soon_threadsafe(left.set)

        _Relay(partial(self._next, beside, deque()), leave).begin()
        await left.wait()

    def _next(self, beside: _Beside, messages: deque[bytes]) -> Callable[[], None] | None:
        """Wait for the next call, and return what makes it; None if none will come any more."""
        try:
            while not messages:
                part = beside.read()
                if part is None:
                    return None
                messages.extend(self._messages.feed(part))
            return self._admitted(messages.popleft())
        except _NO_CALL as error:
            _warn(error)
            return None

    def _leave(self) -> None:
        """Nothing will come any more: abort what is under way."""
        self._has_left = True
        for body in list(self._under_way.values()):
            if body is not None:
                THREADS.run(partial(self._calls.abort, body))

    def _say(self, message: bytes) -> None:
        """Send an answer, or what the server says of itself; from any thread."""
        if self._beside is not None:
            self._beside.writer.write(framed(message))
            return
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._answers.put_nowait, message)

    async def _speak(self) -> None:
        """Send what the event loop has to send."""
        while True:
            message = await self._answers.get()
            await self._send({"type": "http.response.body", "body": message + b"\n", "more_body": True})

    def _admitted(self, message: bytes) -> Callable[[], None]:
        """Return what makes the call that a message is, on a thread. From now on it is under way."""
        data = json.loads(message.decode())
        name, body = data["call"], data["body"]
        if not isinstance(body, dict):
            raise TypeError("the body of a call is a table")
        offer = self._calls.offers.get(name)
        if "id" not in data and (offer is None or not offer.is_note):
            raise ValueError(f"/{brief(name)} has an answer, and so needs an id")
        unsent = self._answers.qsize() + (self._beside.writer.left if self._beside is not None else 0)
        if len(self._under_way) + unsent >= _MOST_CALLS:
            raise ValueError(f"more than {_MOST_CALLS} calls at once")
        number = next(self._numbers)
        self._under_way[number] = body if offer is not None and offer.aborts else None
        return partial(self._perform, number, data)

    def _perform(self, number: int, data: dict[str, Any]) -> None:
        """Make a call, on a thread."""
        name = data["call"]
        status, answer = self._calls.perform(name, data["body"]) if name in self._calls.offers else (404, None)
        if "id" in data:
            self._answer(name, {"id": data["id"], "status": status, "body": answer})
        elif status >= 400:
            logger.warning("/%s, whose answer nobody waits for, has failed: %s", name, answer)
        if self._beside is None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                self._loop.call_soon_threadsafe(self._forget, number, PASSES)
        elif not self._beside.has_hung_up:  # else whoever reads is about to notice that, and aborts it
            del self._under_way[number]

    def _answer(self, name: str, said: dict[str, Any]) -> None:
        try:
            text = _JSON.encode(said)
        except (TypeError, ValueError, RecursionError) as error:
            failed = error_to_dict(TransferError(f"The answer to /{name} is not JSON-safe.", cause=str(error)))
            text = _JSON.encode({"id": said["id"], "status": 500, "body": {"error": failed}})
        self._say(text.encode())

    def _forget(self, number: int, passes: int) -> None:
        """Let go of a call once its answer has gone out to somebody."""
        if passes and not self._has_left:
            self._loop.call_soon(self._forget, number, passes - 1)
        else:
            self._under_way.pop(number, None)


class _Relay:
    """Has a thread take calls and make them; while one takes long, another thread takes the next ones.

    Nobody is woken between what has come and what becomes of it, nor for a while after that: threads share the
    interpreter, and what an update does first is what the trainer waits for.

    Args:
        take: waits for a call and returns it; None if none will come any more.
        leave: is called then.
    """

    def __init__(self, take: Callable[[], Callable[[], None] | None], leave: Callable[[], None]) -> None:
        self._take, self._leave = take, leave
        self._lock = threading.Lock()
        self._turn = 0  # the number of threads that have taken over: the last of them takes calls
        self._long: Deadline | None = None  # when the call that it makes has taken long; None if it makes none
        self._is_watched = False  # whether a thread waits for that

    def begin(self) -> None:
        """Begin, on a thread."""
        THREADS.run(partial(self._run, self._turn))

    def _run(self, turn: int) -> None:
        is_mine = True
        try:
            while (call := self._take()) is not None:
                with self._lock:
                    self._long = Deadline(_LONG)
                    is_watched, self._is_watched = self._is_watched, True
                if not is_watched:
                    THREADS.run(self._relieve)
                call()
                with self._lock:
                    is_mine = turn == self._turn
                    if not is_mine:
                        return
                    self._long = None
        finally:
            if is_mine:
                self._leave()

    def _relieve(self) -> None:
        """Take calls from now on, once whoever does makes one that takes long; end if he makes none."""
        while True:
            with self._lock:
                if self._long is None:
                    self._is_watched = False
                    return
                left = self._long.remaining()
                if not left:
                    self._long, self._is_watched = None, False
                    self._turn = turn = self._turn + 1
                    break
            time.sleep(left)
        self._run(turn)


class _Beside:
    """Reads and writes a connection without TLS on threads, beside the event loop, which does neither any more.

    Args:
        connection: nothing may be read or written in another way, but for the end.
        loop: the event loop.

    Attributes:
        writer: writes.
    """

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.writer = DirectWriter(own_socket(connection.transport), loop)
        self._sock = own_socket(connection.transport)
        self._closing = threading.Lock()
        self._chunks = Chunks()
        self._parts: deque[bytes] = deque()
        self._coming = select.poll()
        self._coming.register(self._sock, select.POLLIN)

    @classmethod
    def of(cls, connection: Connection, request: Request, loop: asyncio.AbstractEventLoop) -> Self | None:
        """Return what reads and writes the connection of a request, whose body is still to come, in chunks.

        None under TLS, if there is no such body, or if some of it has come, or something has not gone out yet.
        """
        transport, cycle = connection.transport, connection.cycle
        is_secured = transport.get_extra_info("ssl_object") is not None
        is_to_come = cycle.more_body and request.headers.get("transfer-encoding") == "chunked"
        has_come = cycle.body or connection.conn.trailing_data[0]
        if is_secured or has_come or not is_to_come or transport.get_write_buffer_size():
            return None
        return cls(connection, loop)

    @property
    def has_hung_up(self) -> bool:
        """Whether the other end has closed the connection."""
        with self._closing:
            if self._sock.fileno() < 0:
                return True
            end = select.poll()  # of its own: several threads may ask
            end.register(self._sock, _HUNG_UP)
            return bool(end.poll(0))

    def read(self) -> bytes | None:
        """Wait for some of the request's body, on one thread at a time; return None once nothing will come any more.

        Raises:
            ValueError: something else has come.
        """
        while not self._parts:
            if self._chunks.ended:
                return None
            self._coming.poll()
            try:
                data = self._sock.recv(_PIECE)
            except BlockingIOError:
                continue
            except OSError:  # it was reset
                return None
            if not data:
                return None
            self._parts.extend(self._chunks.feed(data))
        return self._parts.popleft()

    def end(self) -> None:
        """Read nothing more; by whoever has read."""
        self._shut()
        with self._closing:
            self._sock.close()

    def close(self) -> None:
        """Write nothing more, and have whoever reads notice the end."""
        self._shut()
        self.writer.close()

    def _shut(self) -> None:
        with self._closing, suppress(OSError):  # it is shut already, or the other end has gone
            self._sock.shutdown(socket.SHUT_RD)


def _warn(error: Exception) -> None:
    logger.warning("closed a line on which something else than calls came: %s", error)


async def _wait(ending: asyncio.Event) -> None:
    await ending.wait()
