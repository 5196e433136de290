"""Writes to a socket on whichever thread has something to say: waking another one takes longer than writing."""

from __future__ import annotations

import os
import socket
import threading
from asyncio import AbstractEventLoop, BaseTransport
from collections import deque
from contextlib import suppress


def own_socket(transport: BaseTransport) -> socket.socket:
    """Return a socket of one's own on the connection of a transport, which goes on when the transport is aborted."""
    return socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))


class DirectWriter:
    """Writes in order, from any thread; what the other end does not take at once, the event loop writes later.

    It raises nothing: whoever reads from the connection learns that it is lost.

    Args:
        sock: non-blocking, and nobody else writes to it; `close` closes it.
        loop: the event loop.
    """

    def __init__(self, sock: socket.socket, loop: AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._lock = threading.Lock()
        self._left: deque[bytes | memoryview] = deque()
        self._closed = False

    @property
    def left(self) -> int:
        """Messages that have not gone out yet."""
        return len(self._left)

    def write(self, data: bytes) -> None:
        """Write one message, now or as soon as those before it have gone out."""
        with self._lock:
            if self._left:
                self._left.append(data)
                return
            rest = self._send(data)
            if not rest:
                return
            self._left.append(rest)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._wait)

    def close(self) -> None:
        """Close the socket; on the event loop. What is left is not written."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.remove_writer(self._sock)
                self._sock.close()

    def _wait(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._sock, self._go_on)

    def _go_on(self) -> None:
        with self._lock:
            while self._left:
                rest = self._send(self._left[0])
                if rest:
                    self._left[0] = rest
                    return
                self._left.popleft()
            self._loop.remove_writer(self._sock)

    def _send(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return what the other end does not take now."""
        if self._closed:
            return b""
        try:
            return memoryview(data)[self._sock.send(data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""
