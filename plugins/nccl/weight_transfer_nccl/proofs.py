"""How members and trainer prove to each other that they know the secret, which itself is never sent.

The trainer sends a nonce. The member answers with a nonce of its own and a code over both, the trainer with another
code over both. Everything has a fixed length: what a stranger sends is compared, and never parsed.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from typing import TYPE_CHECKING

from weight_transfer.errors import HandshakeError

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from weight_transfer.authoring import Deadline

_NONCE = 32  # bytes
CODE = 32
"""Bytes of a code: SHA-256's."""


def code(secret: str, *what: object) -> bytes:
    """Return the code that only who knows the secret can make of some words or bytes."""
    parts = (each if isinstance(each, bytes) else str(each).encode() for each in what)
    return hmac.digest(secret.encode(), b"/".join(parts), "sha256")


async def admit(reader: StreamReader, writer: StreamWriter, secret: str) -> bool:
    """Return whether who has connected knows the secret; it is then shown that this side does, too.

    Raises:
        asyncio.IncompleteReadError, OSError: the connection has ended.
    """
    ours = secrets.token_bytes(_NONCE)
    writer.write(ours)
    answer = await reader.readexactly(_NONCE + CODE)
    theirs, shown = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(shown, code(secret, "member", ours, theirs)):
        return False
    writer.write(code(secret, "trainer", ours, theirs))
    return True


def prove(sock: socket.socket, secret: str, deadline: Deadline) -> None:
    """Show the other end that this member knows the secret, and see that the other end does.

    Raises:
        HandshakeError: it does not, or it closed the connection.
        OSError: the connection broke, or the deadline passed.
    """
    theirs = _exactly(sock, _NONCE, deadline)
    ours = secrets.token_bytes(_NONCE)
    sock.sendall(ours + code(secret, "member", theirs, ours))
    if not hmac.compare_digest(_exactly(sock, CODE, deadline), code(secret, "trainer", theirs, ours)):
        raise _stranger()


def _exactly(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(deadline.remaining(), 1e-3))
        part = sock.recv(count - len(data))
        if not part:
            raise _stranger()
        data += part
    return data


def _stranger() -> HandshakeError:
    return HandshakeError(
        "What listens at the trainer's rendezvous does not share this member's secret: it is another trainer, or an "
        "earlier session.",
        backend="nccl",
        phase="init",
    )
