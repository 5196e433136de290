"""What carries a line at the trainer's end: a socket that any thread reads and writes, or TLS on the event loop."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, cast

from weight_transfer.control.direct_writer import DirectWriter, own_socket

_IDLE = 30  # seconds after which the kernel asks whether the other end is still there, so that no firewall forgets it
_ASKS = 4  # in vain, before it counts as gone
_INTERVAL = 10  # seconds between them
_CHUNK = 2**18  # bytes

Take = Callable[[bytes], object]
Lost = Callable[[Exception | None], object]


class Wire(Protocol):
    """One connection. What comes is taken in order, by one thread at a time; then it is lost, once."""

    def write(self, data: bytes) -> None:
        """Write, from any thread; raises nothing."""

    def close(self) -> None:
        """Have it closed soon, from any thread."""


async def connect(host: str, port: int, tls: Any, take: Take, lost: Lost) -> Wire:
    """Connect.

    Args:
        host: where to.
        port: there.
        tls: the SSL context; None for none.
        take: called with what comes.
        lost: called with the reason once nothing will come any more; None if the other end, or this one, has closed it.

    Raises:
        OSError: it failed.
    """
    loop = asyncio.get_running_loop()
    if tls is not None:
        _, wire = await loop.create_connection(lambda: SecuredWire(take, lost), host, port, ssl=tls)
        return wire
    transport, _ = await loop.create_connection(asyncio.Protocol, host, port)
    sock = own_socket(transport)
    transport.abort()
    return PlainWire(sock, take, lost)


class PlainWire:
    """A socket. Whoever has something to say writes it, and whoever waits may read, beside the event loop.

    Args:
        sock: connected and non-blocking.
        take: see `connect`.
        lost: see there.
    """

    def __init__(self, sock: socket.socket, take: Take, lost: Lost) -> None:
        self._sock = sock
        self._take, self._lost = take, lost
        self._loop = asyncio.get_running_loop()
        self._writer = DirectWriter(sock, self._loop)
        self._reading = threading.Lock()
        self._closed = False
        _keep_alive(sock)
        self._eye = _Eye(sock, self._loop, self.read)

    def fileno(self) -> int:
        """Return the descriptor, which can be read when something has come; -1 once it is closed."""
        return self._sock.fileno()

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def read_alone(self, alone: bool) -> None:
        """Have the event loop not read from now on, or again: its thread would be woken to no purpose."""
        with self._reading:
            if not self._closed:
                (self._eye.shut if alone else self._eye.open)()

    def read(self) -> None:
        """Take what has come, if anything has; from any thread."""
        with self._reading:
            if self._closed:
                return
            try:
                data = self._sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(error)
                return
            if not data:
                self._end(None)
                return
            try:
                self._take(data)
            except BaseException:  # Ctrl-C: nobody knows what of it was taken
                self._end(None)
                raise

    def close(self) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        self._closed = True
        with suppress(RuntimeError):  # the loop has ended, and the line with it
            self._loop.call_soon_threadsafe(self._hang_up, error)

    def _hang_up(self, error: Exception | None) -> None:
        with self._reading:
            if self._sock.fileno() < 0:
                return
            self._eye.close()
            self._writer.close()
        self._lost(error)


class _Eye:
    """By what an event loop sees that a socket can be read. Any thread may shut it and open it, which wakes nobody.

    It sees the socket through an epoll set once it was to be shut, so that not each connection takes two descriptors.

    Args:
        sock: the socket.
        loop: the event loop, on which this is made and closed.
        see: is called on the loop.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, see: Callable[[], object]) -> None:
        self._sock, self._loop, self._see = sock, loop, see
        self._set: select.epoll | None = None
        self._is_wanted = self._is_closed = False
        loop.add_reader(sock, see)

    def shut(self) -> None:
        if self._set is not None:
            self._set.modify(self._sock, 0)
        elif not self._is_wanted and hasattr(select, "epoll"):
            self._is_wanted = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._look_through)

    def open(self) -> None:
        if self._set is not None:
            self._set.modify(self._sock, select.EPOLLIN)

    def close(self) -> None:
        self._is_closed = True
        self._loop.remove_reader(self._sock if self._set is None else self._set)
        if self._set is not None:
            self._set.close()

    def _look_through(self) -> None:
        if self._is_closed:
            return
        seen = select.epoll()
        seen.register(self._sock, select.EPOLLIN)
        self._loop.remove_reader(self._sock)
        self._loop.add_reader(seen, self._see)
        self._set = seen


class SecuredWire(asyncio.Protocol):
    """TLS, which belongs to the event loop: each message wakes it.

    Args:
        take: see `connect`.
        lost: see there.
    """

    def __init__(self, take: Take, lost: Lost) -> None:
        self._take, self._lost = take, lost
        self._loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        self._loop.call_soon_threadsafe(self._transport.write, data)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._transport.abort)  # close would wait for the other end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(error)


def _keep_alive(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _INTERVAL), ("TCP_KEEPCNT", _ASKS)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
