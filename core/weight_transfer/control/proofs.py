"""How two ends of a connection prove to each other that they know a secret, which itself is never sent.

Whoever listens sends a nonce. Whoever has connected answers with a nonce of its own and a keyed digest (HMAC) of both,
and gets another one of both. Everything has a fixed length: what a stranger sends is compared, and never parsed.
"""

from __future__ import annotations

import hmac
import secrets
from functools import partial
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import socket

    from weight_transfer.values.deadline import Deadline

_NONCE = 32  # bytes
DIGEST_BYTES = 32
"""Bytes of a keyed digest: SHA-256's."""
ANSWER_BYTES = _NONCE + DIGEST_BYTES
"""Bytes of the answer to a challenge."""


def keyed_digest(secret: str, *what: object) -> bytes:
    """Return the digest that only who knows the secret can make of some words or bytes."""
    parts = (each if isinstance(each, bytes) else str(each).encode() for each in what)
    return hmac.digest(secret.encode(), b"/".join(parts), "sha256")


@attrs.frozen
class Challenge:
    """What one that has connected is asked; for one connection.

    Attributes:
        nonce: is to be sent.
    """

    nonce: bytes = attrs.field(factory=partial(secrets.token_bytes, _NONCE))

    def reply(self, answer: bytes, secret: str) -> bytes | None:
        """Return what shows that this end knows the secret, too; None if the answer does not show that the other does.

        Args:
            answer: that came, of `ANSWER_BYTES` bytes.
            secret: what both know.
        """
        theirs, shown = answer[:_NONCE], answer[_NONCE:]
        if not hmac.compare_digest(shown, keyed_digest(secret, "connects", self.nonce, theirs)):
            return None
        return keyed_digest(secret, "listens", self.nonce, theirs)


def prove_secret(sock: socket.socket, secret: str, deadline: Deadline) -> bool:
    """Show the listening end that this one knows the secret; return whether that knows it, too, and says so.

    Raises:
        OSError: the connection broke before a challenge came, or the deadline passed.
    """
    theirs = _exactly(sock, _NONCE, deadline)
    ours = secrets.token_bytes(_NONCE)
    try:
        sock.sendall(ours + keyed_digest(secret, "connects", theirs, ours))
        shown = _exactly(sock, DIGEST_BYTES, deadline)
    except ConnectionError:  # it hangs up on whoever does not know it
        return False
    return hmac.compare_digest(shown, keyed_digest(secret, "listens", theirs, ours))


def _exactly(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(deadline.remaining(), 1e-3))
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionError("the other end has closed the connection")
        data += part
    return data
