"""The first call to each worker: it says what it is, once it is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError

if TYPE_CHECKING:
    from weight_transfer.session.calls import Lost
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.deadline import Deadline

_RETRY_INTERVAL = 0.1  # seconds between two looks at a worker that does not answer yet


class Greeting:
    """Asks workers for their status; called with one of them it waits until that is up.

    Args:
        backend: the trainer's.
        deadline: until when a worker that is not up is waited for.
        may_ask_again: whether to go on waiting.
    """

    def __init__(self, backend: str, deadline: Deadline, may_ask_again: Callable[[], bool]) -> None:
        self._backend = backend
        self._deadline = deadline
        self._may_ask_again = may_ask_again
        self._unreachable: dict[Peer, PeerLostError] = {}

    def __call__(self, peer: Peer) -> None:
        """Ask until the worker answers, and take down what it says.

        Raises:
            HandshakeError: it is none that this trainer can send to.
            PeerLostError: it did not come up.
        """
        while True:
            try:
                self._learn(peer, peer.wait_for_status())
                return
            except PeerLostError as error:
                self._unreachable[peer] = error
                if error.permanent or not self._may_ask_again() or self._deadline.remaining() < _RETRY_INTERVAL:
                    raise
                time.sleep(_RETRY_INTERVAL)

    def take(self, failures: Lost, statuses: Mapping[Peer, object]) -> Lost:
        """Take down what workers have said; return those that failed for good, and not because they are not up yet."""
        failed: Lost = {}
        for peer, error in failures.items():
            if isinstance(error, PeerLostError) and not error.permanent:
                self._unreachable[peer] = error
            else:
                failed[peer] = error
        for peer, status in statuses.items():
            try:
                self._learn(peer, status)
            except HandshakeError as error:
                failed[peer] = error
        return failed

    def explained(self, failures: Lost) -> Lost:
        """Return failures, with why a worker could not be reached in place of that it was late."""
        return {
            peer: self._unreachable.get(peer, error) if isinstance(error, TransferTimeoutError) else error
            for peer, error in failures.items()
        }

    def _learn(self, peer: Peer, status: object) -> None:
        peer.status = status if isinstance(status, dict) else {}
        backend = peer.status.get("backend", self._backend)
        if backend != self._backend:
            raise HandshakeError(
                f"The worker uses backend {backend!r}, the trainer {self._backend!r}; use one.",
                peer=peer.address,
                phase="init",
            )
        count = peer.status.get("workers", peer.count)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise HandshakeError(
                f"Its status says that {count!r} workers are behind it; a number from 1 on was expected.",
                peer=peer.address,
                phase="init",
            )
        peer.count = count
        committed = peer.status.get("committed")
        peer.committed = dict(committed) if isinstance(committed, dict) else {}
        peer.greeted = True


def require_distinct(peers: Iterable[Peer]) -> None:
    """Raise unless each worker is behind one of the channels alone.

    Raises:
        ConfigError: one is there twice.
    """
    owners: dict[str, Peer] = {}
    for peer in peers:
        for own in peer.ids:
            other = owners.setdefault(own, peer)
            if other is not peer:
                raise ConfigError(f"{other.address} and {peer.address} are the same worker; name each worker once.")
