"""The sender's hold on its workers: its lease, and whether another trainer has taken one of them over."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weight_transfer.errors import ReplacedError, WeightTransferError
from weight_transfer.values.lease import Lease, session_of

if TYPE_CHECKING:
    from weight_transfer.session.peers import Peer


class Tenure:
    """From the first join until the sender is closed, or replaced.

    Attributes:
        lease: the sender's; None before the first join.
        replaced: why it is refused from now on; None as long as no other trainer has taken a worker over.
    """

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.replaced: ReplacedError | None = None
        self._name = secrets.token_hex(8)
        self._joins = itertools.count(1)

    def next_session(self) -> str:
        """Return a name for the next join."""
        return session_of(self._name, next(self._joins))

    def ends_for(self, peers: Sequence[Peer]) -> bool:
        """Return whether the lease is too old for workers that were added since it was taken.

        Raises:
            ReplacedError: a newer trainer has taken one of the others over, as its status tells.
        """
        if self.lease is None:
            return False
        newer = {peer: peer.lease.number for peer in peers if peer.lease is not None and self.lease < peer.lease}
        for peer, number in newer.items():
            if not peer.added:
                raise ReplacedError(
                    f"Another trainer (lease {number}) has taken this worker over from this one (lease "
                    f"{self.lease.number}); create a new WeightSender to take it back.",
                    peer=peer.address,
                    phase="init",
                    lease=number,
                )
        return bool(newer)

    def take(self, peers: Sequence[Peer], anew: bool) -> Lease:
        """Return the lease, which is taken once, or ``anew``, from what the workers have told."""
        if self.lease is None or anew:
            self.lease = Lease.after((peer.lease for peer in peers), self._name)
        for peer in peers:
            peer.added = peer.added and not peer.greeted
        return self.lease

    def require(self) -> None:
        """Raise if this trainer was replaced."""
        if self.replaced is not None:
            raise self.replaced

    def cause(self, error: BaseException) -> BaseException:
        """Return why an update that was aborted has failed: because this trainer was replaced, or by its own error.

        A trainer that was replaced may see a lost connection first, or a deadline that has passed.
        """
        if isinstance(error, ReplacedError):
            self.replaced = error
        return self.replaced if self.replaced is not None and isinstance(error, WeightTransferError) else error
