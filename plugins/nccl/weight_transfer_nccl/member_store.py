"""A member's side of the rendezvous: what torch's process groups take for their store."""

from __future__ import annotations

import base64
import json
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import prove_secret
from weight_transfer.errors import HandshakeError, PeerLostError
from weight_transfer_nccl.rendezvous import Rendezvous, dist

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_PATIENCE = 2.0  # seconds for an answer once the members have joined: the trainer may stand still
_PART = 2**16  # bytes taken at a time
_MARGIN = 1.0  # seconds by which an answer may come later than the wait that was asked for


class MemberStore(dist.Store):  # type: ignore[misc]  # what torch.distributed holds depends on the build
    """Asks the trainer's `MeetingPlace`. Whoever hands it to torch keeps it alive as long as torch's object.

    Args:
        meeting: where that is.
        deadline: until then it is reached, and answers; after `joined`, each answer has two seconds.

    Raises:
        PeerLostError: it cannot be reached.
        HandshakeError: it does not share the secret.
        TransferTimeoutError: it does not answer in time.
    """

    def __init__(self, meeting: Rendezvous, deadline: Deadline) -> None:
        super().__init__()
        self._deadline: Deadline | None = deadline
        self._lock = threading.Lock()
        where = f"{meeting.address} port {meeting.port}"
        try:
            self._socket = socket.create_connection(
                (meeting.address, meeting.port), timeout=max(deadline.remaining(), 1e-3)
            )
        except OSError as error:
            raise _lost(f"The trainer's rendezvous at {where} cannot be reached.", error) from error
        try:
            if not prove_secret(self._socket, meeting.secret, deadline):
                raise HandshakeError(
                    f"What listens at {where} does not share this member's secret: it is another trainer, or an "
                    "earlier session.",
                    backend="nccl",
                    phase="init",
                )
        except OSError as error:
            self.close()
            if deadline.expired:
                raise deadline.timeout(f"waiting for the trainer's rendezvous at {where}", phase="init") from error
            raise _lost(f"The trainer's rendezvous at {where} closed the connection.", error) from error
        except BaseException:
            self.close()
            raise

    def joined(self) -> None:
        """From now on wait for two seconds at most for an answer."""
        self._deadline = None

    def close(self) -> None:
        """End the connection, and whoever waits for an answer; callable from any thread."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def set(self, key: str, value: bytes | str) -> None:
        """Make a value known."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask({"set": {key: base64.b64encode(data).decode()}})

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        return self._await([key], self._seconds())[0]

    def check(self, keys: list[str]) -> bool:
        """Return whether values are known."""
        return None not in self._ask({"get": keys})

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until values are known."""
        self._await(keys, self._seconds() if timeout is None else min(timeout.total_seconds(), self._seconds()))

    def clone(self) -> MemberStore:
        """Return this store, which several threads may use."""
        return self

    def _await(self, keys: list[str], seconds: float) -> list[bytes]:
        found = self._ask({"get": keys, "seconds": seconds}, seconds)
        if None in found:
            raise TimeoutError(f"the other members did not tell {', '.join(keys)} within {seconds:.3g} s")
        return [base64.b64decode(value) for value in found if value is not None]

    def _ask(self, request: dict[str, Any], seconds: float = 0.0) -> list[str | None]:
        with self._lock:
            try:
                self._socket.settimeout(max(seconds, self._seconds()) + _MARGIN)
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                line = self._line()
            except OSError as error:
                self.close()  # an answer that comes late would be taken for the next one's
                raise _lost("The trainer's rendezvous does not answer.", error) from error
        answer: list[str | None] = json.loads(line)
        return answer

    def _line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            part = self._socket.recv(_PART)
            if not part:
                raise ConnectionError("the trainer closed it")
            data += part
        return data

    def _seconds(self) -> float:
        return _PATIENCE if self._deadline is None else max(self._deadline.remaining(), 1e-3)


def _lost(message: str, error: Exception) -> PeerLostError:
    return PeerLostError(message, backend="nccl", phase="init", peer="trainer", cause=str(error))
