"""The Unix socket between the trainer and a worker: passes file descriptors, and tells at once when a peer dies.

Addresses are abstract (Linux), so no file is left behind. Both ends check that the other one has the same user id, and
the worker shows the token that came with its init info.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from weight_transfer.authoring import Deadline
from weight_transfer.errors import HandshakeError, PeerLostError

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_MAX_MESSAGE = 1 << 20
_ACCEPT_INTERVAL = 0.05  # seconds; on Linux nothing wakes an accept on a Unix socket
_MAX_SIGNALS = 4096  # bytes taken at a time
_MAX_FDS = 64  # descriptors per message; the kernel's limit is 253


class Connection:
    """A connected socket.

    Args:
        sock: the socket.
        peer: how messages call the other side.

    Attributes:
        pid: the other end's process id, as this process sees it; 0 in another container.
        gpu: UUID of a worker's GPU as hexadecimal text, None if its weights lie in host memory.
    """

    gpu: object = None

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self.peer = peer
        self.pid, uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid != os.getuid():
            sock.close()
            raise HandshakeError(
                f"User {uid} owns the other end, not {os.getuid()}; run both as one user.", backend="ipc", peer=peer
            )

    @classmethod
    def connect(cls, address: str, deadline: Deadline, peer: str = "trainer") -> Connection:
        """Connect to a listener; ``peer`` is how messages call it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(max(deadline.remaining(), 1e-3))
        try:
            sock.connect("\0" + address)
        except OSError as error:
            sock.close()
            raise PeerLostError(
                "The trainer's Unix socket cannot be reached; ipc needs one host and one network namespace.",
                backend="ipc",
                peer=peer,
                cause=str(error),
            ) from error
        return cls(sock, peer)

    def send(self, message: dict[str, Any], fds: list[int], deadline: Deadline) -> None:
        """Send a small JSON message, with file descriptors."""
        data = json.dumps(message).encode()
        with _mapped(self, deadline, "sending to"):
            socket.send_fds(self._socket, [_LENGTH.pack(len(data))], fds)
            self._socket.sendall(data)

    def receive(self, deadline: Deadline) -> tuple[dict[str, Any], list[int]]:
        """Receive a message and its file descriptors, which are the caller's to close."""
        with _mapped(self, deadline, "waiting for"):
            head, fds, _, _ = socket.recv_fds(self._socket, _LENGTH.size, _MAX_FDS)
            try:
                return self._message(head), fds
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    def signal(self, deadline: Deadline) -> None:
        """Send one byte."""
        with _mapped(self, deadline, "sending to"):
            self._socket.sendall(b"\1")

    def await_signal(self, deadline: Deadline) -> None:
        """Wait for one byte."""
        with _mapped(self, deadline, "waiting for"):
            self._exactly(1)

    def take_signals(self) -> int:
        """Return how many bytes have arrived; waits for nothing."""
        self._socket.settimeout(0)
        try:
            data = self._socket.recv(_MAX_SIGNALS)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost()
        return len(data)

    def check_alive(self) -> None:
        """Raise if the other end has closed its socket or died; waits for nothing."""
        self._socket.settimeout(0)  # with a timeout set, Python would wait in spite of MSG_DONTWAIT
        try:
            if self._socket.recv(1, socket.MSG_PEEK) == b"":
                raise self._lost()
        except BlockingIOError:
            return
        except OSError as error:
            raise self._lost(error) from error

    def interrupt(self) -> None:
        """End every wait on this socket, on both sides; callable from any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is not connected any more: nobody waits

    @staticmethod
    def await_end(connections: Sequence[Connection]) -> Connection:
        """Wait, without a deadline, until either end of one has closed or interrupted it, or died; return that one."""
        poll = select.poll()
        by_number = {each._socket.fileno(): each for each in connections}  # noqa: SLF001
        for number in by_number:
            poll.register(number, select.POLLRDHUP)
        return by_number[poll.poll()[0][0]]

    def say_goodbye(self) -> None:
        """Tell the other end that nothing more will come; `await_goodbye` then waits for its answer."""
        with contextlib.suppress(OSError):  # it is not connected any more: there is nobody to tell
            self._socket.shutdown(socket.SHUT_WR)

    def await_goodbye(self, deadline: Deadline) -> None:
        """Wait until the other end has closed or interrupted the connection too, or died."""
        with contextlib.suppress(PeerLostError), _mapped(self, deadline, "waiting for the goodbye of"):
            while self._socket.recv(_MAX_SIGNALS):
                pass

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _message(self, head: bytes) -> dict[str, Any]:
        (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
        if length <= _MAX_MESSAGE:
            with contextlib.suppress(ValueError):
                message = json.loads(self._exactly(length))
                if isinstance(message, dict):
                    return message
        raise HandshakeError("The other end does not speak this protocol.", backend="ipc", peer=self.peer)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise self._lost()
            data += part
        return data

    def _lost(self, error: OSError | None = None) -> PeerLostError:
        return PeerLostError(
            "The other process closed its connection or died.",
            backend="ipc",
            peer=self.peer,
            cause=str(error) if error else None,
        )


class _mapped:  # noqa: N801  (used like a function)
    """Sets a socket's timeout and maps its errors."""

    def __init__(self, connection: Connection, deadline: Deadline, what: str) -> None:
        self._connection, self._deadline, self._what = connection, deadline, what

    def __enter__(self) -> None:
        self._connection._socket.settimeout(max(self._deadline.remaining(), 1e-3))  # noqa: SLF001

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        peer = self._connection.peer
        if isinstance(error, PeerLostError) or not isinstance(error, OSError):
            return
        if isinstance(error, TimeoutError):
            raise self._deadline.timeout(f"{self._what} {peer}", backend="ipc", peer=peer) from error
        raise self._connection._lost(error) from error  # noqa: SLF001


class Listener:
    """The trainer's end, where workers connect.

    Attributes:
        address: abstract Unix address, without its leading zero byte.
        token: what a worker must show.
    """

    def __init__(self) -> None:
        self.address = f"weight-transfer-{secrets.token_hex(8)}"
        self.token = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.address)
        self._socket.listen(64)
        self._interrupted = threading.Event()

    def accept(self, deadline: Deadline, wanted: Callable[[], bool] = lambda: True) -> tuple[int, Connection] | None:
        """Wait for the next worker that shows the token, as long as one is ``wanted``.

        Returns:
            Its rank and connection; None for an impostor, or if none is wanted any more.
        """
        sock = self._next(deadline, wanted)
        if sock is None:
            return None
        try:
            connection = Connection(sock, "a worker")
            hello, fds = connection.receive(Deadline(min(deadline.remaining(), 5.0)))
        except (HandshakeError, PeerLostError, TimeoutError):
            sock.close()
            return None
        for fd in fds:
            os.close(fd)
        if not hmac.compare_digest(str(hello.get("token")), self.token) or not isinstance(hello.get("rank"), int):
            connection.close()
            return None
        connection.gpu = hello.get("gpu")
        return hello["rank"], connection

    def interrupt(self) -> None:
        """End a running `accept`, and all later ones."""
        self._interrupted.set()

    @property
    def interrupted(self) -> bool:
        """Whether it is of no more use."""
        return self._interrupted.is_set()

    def _next(self, deadline: Deadline, wanted: Callable[[], bool]) -> socket.socket | None:
        self._socket.settimeout(_ACCEPT_INTERVAL)
        while not self._interrupted.is_set():
            if not wanted():
                return None
            if deadline.expired:
                raise deadline.timeout("waiting for a worker to connect", backend="ipc", phase="init")
            with contextlib.suppress(TimeoutError):
                return self._socket.accept()[0]
        raise PeerLostError("Waiting for workers to connect was interrupted.", backend="ipc", phase="init")

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
