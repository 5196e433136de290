"""Who connects to rank 0 is let in once it has proved to know a secret; nobody waits for the others."""

from __future__ import annotations

import selectors
import socket

import attrs

from weight_transfer.control.open_files import accepted
from weight_transfer.control.proofs import ANSWER_BYTES, Challenge
from weight_transfer.values.deadline import Deadline

_PROOF = 5.0  # seconds in all that whoever has connected gets to prove that it knows the secret
_POLL = 0.05  # seconds between two looks at who has had its time
_STRANGERS = 64  # connections without a proof, beside those of ranks; one more ends the oldest


@attrs.define(eq=False)
class _Stranger:
    challenge: Challenge
    until: Deadline
    answer: bytes = b""


class Admission:
    """Takes connections on one thread, whoever and however many connect.

    Args:
        listener: listens; it is closed at the end.
        secret: what those that are let in know.
        expected: how many of these may come at once.
    """

    def __init__(self, listener: socket.socket, secret: str, expected: int) -> None:
        self._listener = listener
        self._secret = secret
        self._most = _STRANGERS + expected
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def admit(self) -> socket.socket | None:
        """Wait for a moment; return the next connection that is let in, if there is one now."""
        for key, _ in self._selector.select(_POLL):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.fileobj, socket.socket) and self._has_proved(key.fileobj):
                return key.fileobj
        for sock in [sock for sock, stranger in self._strangers.items() if stranger.until.expired]:
            self._drop(sock)
        return None

    def close(self) -> None:
        """Stop listening, and hang up on strangers."""
        for sock in list(self._strangers):
            self._drop(sock)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        sock = accepted(self._listener)
        if sock is None:
            return
        if len(self._strangers) >= self._most:
            self._drop(next(iter(self._strangers)))
        self._strangers[sock] = stranger = _Stranger(Challenge(), Deadline(_PROOF))
        self._selector.register(sock, selectors.EVENT_READ)
        self._say(sock, stranger.challenge.nonce)

    def _has_proved(self, sock: socket.socket) -> bool:
        """Take what has come, and let it in or hang up if that is all; return whether it is let in."""
        stranger = self._strangers.get(sock)
        if stranger is None:  # it was dropped a moment ago
            return False
        try:
            part = sock.recv(ANSWER_BYTES - len(stranger.answer))
        except OSError:
            part = b""
        stranger.answer += part
        if part and len(stranger.answer) < ANSWER_BYTES:
            return False
        reply = stranger.challenge.reply(stranger.answer, self._secret)
        if reply is None or not self._say(sock, reply):
            self._drop(sock)
            return False
        self._selector.unregister(sock)
        del self._strangers[sock]
        return True

    def _say(self, sock: socket.socket, data: bytes) -> bool:
        """Send a few bytes, for which a new connection has room."""
        try:
            sock.sendall(data)
        except OSError:
            self._drop(sock)
            return False
        return True

    def _drop(self, sock: socket.socket) -> None:
        if self._strangers.pop(sock, None) is not None:
            self._selector.unregister(sock)
            sock.close()
