"""The Unix socket between the trainer and a worker: passes file descriptors, and tells at once when a peer dies.

Addresses are abstract (Linux), so no file is left behind. Both ends check whose process the other one is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import HandshakeError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_MAX_MESSAGE = 1 << 20
_RETRY = 0.02  # seconds between two attempts to connect while others queue
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

    gpu: str | None = None

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self.peer = peer
        self.pid, user = credentials(sock)
        if not is_trusted(user):
            sock.close()
            raise HandshakeError(
                f"User {user} owns the other end, not {os.getuid()}; run both as one user.", backend="ipc", peer=peer
            )

    @classmethod
    def connect(cls, address: str, deadline: Deadline, peer: str = "trainer") -> Connection:
        """Connect to a listener; ``peer`` is how messages call it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            while True:
                try:
                    sock.settimeout(max(deadline.remaining(), 1e-3))
                    sock.connect("\0" + address)
                    break
                except BlockingIOError:  # too many queue there: Linux does not wait
                    if deadline.expired:
                        raise
                    time.sleep(_RETRY)
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
                return self._message(head, deadline), fds
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    def send_bytes(self, data: bytes, deadline: Deadline) -> None:
        """Send some bytes as they are."""
        with _mapped(self, deadline, "sending to"):
            self._socket.sendall(data)

    def signal(self, deadline: Deadline) -> None:
        """Send one byte."""
        self.send_bytes(b"\1", deadline)

    def await_signal(self, deadline: Deadline) -> None:
        """Wait for one byte."""
        with _mapped(self, deadline, "waiting for"):
            self._exactly(1, deadline)

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

    def _message(self, head: bytes, deadline: Deadline) -> dict[str, Any]:
        (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head), deadline))
        if length <= _MAX_MESSAGE:
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(self._exactly(length, deadline))
                if isinstance(message, dict):
                    return message
        raise HandshakeError("The other end does not speak this protocol.", backend="ipc", peer=self.peer)

    def _exactly(self, count: int, deadline: Deadline) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(deadline.remaining(), 1e-3))  # of each part: they may trickle
            part = self._socket.recv(count - len(data))
            if not part:
                raise self._lost()
            data += part
        return bytes(data)

    def _lost(self, error: OSError | None = None) -> PeerLostError:
        return PeerLostError(
            "The other process closed its connection or died.",
            backend="ipc",
            peer=self.peer,
            cause=str(error) if error else None,
        )


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of the other end when it connected or listened."""
    pid, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user


def is_trusted(user: int) -> bool:
    """Return whether the processes of a user may be at the other end: this process's own user, and root."""
    return user in (os.getuid(), 0)


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
