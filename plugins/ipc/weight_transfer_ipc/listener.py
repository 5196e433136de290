"""The trainer's end of the Unix sockets, where workers connect while they join."""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable

import attrs

from weight_transfer.authoring import Deadline, accepted
from weight_transfer.errors import PeerLostError
from weight_transfer_ipc.connection import Connection, credentials, is_trusted

_HELLO = struct.Struct(
    "!32sI32s"
)  # token, rank, GPU's UUID or zeros: of fixed length, so that it is compared, not parsed
_TIME = 2.0  # seconds in all that somebody who has connected gets to say hello
_MAX_WAITING = 64  # connections that have not said hello yet; one more ends the oldest
_INTERVAL = 0.05  # seconds between two looks at what else may end the wait


def say_hello(connection: Connection, token: str, rank: int, gpu: str | None, deadline: Deadline) -> None:
    """Say, as a worker, who this is.

    Args:
        connection: to the trainer.
        token: that came with the init info.
        rank: of this worker.
        gpu: UUID of its GPU as 32 hexadecimal digits, None if its weights lie in host memory.
        deadline: for it.
    """
    connection.send_bytes(_HELLO.pack(token.encode(errors="replace"), rank, (gpu or "").encode()), deadline)


@attrs.define(eq=False)
class _Waiting:
    """Somebody who has connected, and what it has said so far."""

    sock: socket.socket
    deadline: Deadline
    said: bytes = b""


class Listener:
    """Where workers connect. Who shows the token is never kept waiting by those who do not.

    Attributes:
        address: abstract Unix address, without its leading zero byte.
        token: what a worker must show.
    """

    def __init__(self) -> None:
        self.address = f"weight-transfer-{secrets.token_hex(8)}"
        self.token = secrets.token_hex(16)
        self._interrupted = threading.Event()
        self._waiting: list[_Waiting] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.address)
        self._socket.listen(1024)
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def accept(self, deadline: Deadline, wanted: Callable[[], bool] = lambda: True) -> tuple[int, Connection] | None:
        """Wait for the next worker that shows the token, as long as one is ``wanted``.

        Returns:
            Its rank and connection; None if none is wanted any more.

        Raises:
            TransferTimeoutError: none came.
            PeerLostError: waiting was interrupted.
        """
        while not self._interrupted.is_set():
            if not wanted():
                return None
            if deadline.expired:
                raise deadline.timeout("waiting for a worker to connect", backend="ipc", phase="init")
            ready = self._selector.select(_INTERVAL)  # on Linux nothing wakes an accept on a Unix socket
            for waiting in [each for each in self._waiting if each.deadline.expired]:
                self._send_away(waiting)
            for key, _ in ready:
                if key.data is None:
                    self._let_wait()
                elif key.data in self._waiting and (joined := self._hear(key.data)):
                    return joined
        raise PeerLostError("Waiting for workers to connect was interrupted.", backend="ipc", phase="init")

    def interrupt(self) -> None:
        """End a running `accept`, and all later ones."""
        self._interrupted.set()

    def close(self) -> None:
        """Stop listening."""
        for waiting in list(self._waiting):
            self._send_away(waiting)
        self._selector.close()
        self._socket.close()

    def _let_wait(self) -> None:
        """Accept somebody; processes of other users are sent away at once."""
        sock = accepted(self._socket)
        if sock is None:
            return
        if not is_trusted(credentials(sock)[1]):
            sock.close()
            return
        if len(self._waiting) == _MAX_WAITING:
            self._send_away(self._waiting[0])
        self._waiting.append(_Waiting(sock, Deadline(_TIME)))
        self._selector.register(sock, selectors.EVENT_READ, self._waiting[-1])

    def _hear(self, waiting: _Waiting) -> tuple[int, Connection] | None:
        """Take in what somebody says; return a worker once it has shown the token."""
        try:
            part = waiting.sock.recv(_HELLO.size - len(waiting.said))  # descriptors that come along are closed
        except OSError:
            part = b""
        waiting.said += part
        if part and len(waiting.said) < _HELLO.size:
            return None
        if len(waiting.said) == _HELLO.size:
            token, rank, gpu = _HELLO.unpack(waiting.said)
            if hmac.compare_digest(token, self.token.encode()):
                self._forget(waiting)
                connection = Connection(waiting.sock, "a worker")
                connection.gpu = gpu.rstrip(b"\0").decode(errors="replace") or None
                return rank, connection
        self._send_away(waiting)
        return None

    def _send_away(self, waiting: _Waiting) -> None:
        self._forget(waiting)
        waiting.sock.close()

    def _forget(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        self._selector.unregister(waiting.sock)
