"""Messages between an engine and its agent process: JSON, a block of bytes, file descriptors, over a socket pair."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import attrs

_HEAD = struct.Struct("!II")
_MAX_FDS = 4


@attrs.frozen
class Message:
    """A message.

    Attributes:
        body: JSON-safe.
        data: bytes that need no JSON.
        fds: file descriptors; the receiver's to close.
    """

    body: dict[str, Any]
    data: bytes = b""
    fds: Sequence[int] = ()


def send(sock: socket.socket, message: Message) -> None:
    """Send a message; its descriptors stay open here."""
    body = json.dumps(message.body).encode()
    socket.send_fds(sock, [_HEAD.pack(len(body), len(message.data))], list(message.fds))
    sock.sendall(body)
    sock.sendall(message.data)


def receive(sock: socket.socket) -> Message:
    """Receive a message.

    Raises:
        EOFError: the other end closed the socket or died.
    """
    head, fds, _, _ = socket.recv_fds(sock, _HEAD.size, _MAX_FDS)
    try:
        head += _exactly(sock, _HEAD.size - len(head)) if head else b""
        if not head:
            raise EOFError
        body, data = _HEAD.unpack(head)
        return Message(json.loads(_exactly(sock, body)), _exactly(sock, data), fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)
