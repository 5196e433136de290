"""Connections between the trainer's ranks: small JSON messages over TCP, each wait with a deadline."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import HandshakeError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.values.deadline import Deadline

_LENGTH = struct.Struct("!Q")
_MAX_BYTES = 2**30  # of one message: the layout of a very large model has some megabytes

Message = dict[str, Any]


class Line:
    """One end of a connection between two trainer ranks. What arrives is read at once, on a thread of its own.

    Args:
        sock: connected; the line closes it.
        peer: how errors call the other rank.
        hear: called on that thread with each message, and with None once the line has ended.
    """

    def __init__(self, sock: socket.socket, peer: str, hear: Callable[[Message | None], None]) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self.peer = peer
        self.ended = threading.Event()
        self._socket = sock
        self._hear = hear
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name=f"weight-transfer line to {peer}", daemon=True).start()

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send a message.

        Raises:
            PeerLostError: the other rank has closed the line or died.
            TransferTimeoutError: the deadline passed.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            try:
                _send_all(self._socket, _LENGTH.pack(len(data)) + data, deadline)
            except TimeoutError as error:
                raise deadline.timeout(f"calling {self.peer}", peer=self.peer) from error
            except OSError as error:
                raise self.lost() from error

    def lost(self) -> PeerLostError:
        """Return the error that says that the other rank is gone."""
        return PeerLostError("It closed its connection or died.", peer=self.peer)

    def finish(self) -> None:
        """Say nothing more; what was sent still arrives. The line ends when the other end has closed it, too."""
        with suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the line on both sides."""
        with suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        message: Message | None
        while True:
            try:
                message = read_message(self._socket)
            except (OSError, ValueError, RecursionError):
                message = None
            if message is None:
                self.ended.set()
            self._hear(message)
            if message is None:
                self._socket.close()
                return


def read_message(sock: socket.socket) -> Message | None:
    """Return the next message; None at the end of the stream.

    Raises:
        OSError: the connection broke, or its timeout passed.
        ValueError, RecursionError: what came is no message.
    """
    head = _exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _MAX_BYTES:
        raise ValueError(f"a message of {length} bytes is announced")
    data = _exactly(sock, length)
    message = None if data is None else json.loads(data)
    if data is not None and not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message


def first_message(sock: socket.socket, deadline: Deadline) -> Message:
    """Return the first message of a new connection, for a handshake.

    Raises:
        HandshakeError: something else came, or nothing.
    """
    sock.settimeout(max(deadline.remaining(), 1e-3))
    try:
        message = read_message(sock)
    except (OSError, ValueError, RecursionError) as error:
        raise HandshakeError("The other trainer rank does not speak this protocol.", cause=str(error)) from error
    if message is None:
        raise HandshakeError("The other trainer rank closed the connection at once.")
    return message


def say(sock: socket.socket, message: Message, deadline: Deadline) -> None:
    """Send a message on a connection that is no line yet.

    Raises:
        OSError: it broke, or the deadline passed.
    """
    data = json.dumps(message).encode()
    _send_all(sock, _LENGTH.pack(len(data)) + data, deadline)


def _send_all(sock: socket.socket, data: bytes, deadline: Deadline) -> None:
    """Send everything, though another thread waits on the same socket without a timeout."""
    view = memoryview(data)
    while view:
        try:
            sent = sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            _await_room(sock, deadline)
            continue
        view = view[sent:]


def _await_room(sock: socket.socket, deadline: Deadline) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(max(deadline.remaining(), 1e-3) * 1e3):
        raise TimeoutError("the other end takes nothing")


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            return None
        view = view[got:]
    return bytes(data)
