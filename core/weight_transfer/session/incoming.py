"""What the core hands to a worker's engine of an update by region, and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.plan.exchange import IncomingRegions

if TYPE_CHECKING:
    from weight_transfer.session.keeping import Arrivals
    from weight_transfer.session.update import Update


class Incoming(IncomingRegions):
    """Counts what an engine has written, by trainer rank.

    Args:
        arrivals: what is to come.
        update: the guard, which is told of every write.

    Attributes:
        counts: bytes that have come, by trainer rank.
    """

    def __init__(self, arrivals: Arrivals, update: Update) -> None:
        self.layout, self.pieces, self.targets = arrivals.layout, arrivals.pieces, arrivals.targets
        self.counts = [0] * len(arrivals.planned)
        self._planned = arrivals.planned
        self._update = update

    def write_in_place(self) -> None:
        self._update.write_in_place()

    def moved(self, rank: int, nbytes: int) -> None:
        """Count bytes of a trainer rank.

        Raises:
            ManifestMismatchError: there is no such rank, or the number is negative.
        """
        if not 0 <= rank < len(self.counts) or nbytes < 0:
            raise ManifestMismatchError(
                f"The engine wrote {nbytes} bytes of trainer rank {rank}, of ranks 0 to {len(self.counts) - 1}.",
                phase="update",
            )
        self.counts[rank] += int(nbytes)
        self._update.moved(int(nbytes))

    def finish(self) -> None:
        """See that all has come.

        Raises:
            ManifestMismatchError: more or fewer bytes of a rank have come than were planned; it is named.
        """
        for rank, (count, planned) in enumerate(zip(self.counts, self._planned, strict=True)):
            if count != planned:
                raise ManifestMismatchError(
                    f"{count} bytes of trainer rank {rank} arrived by region where {planned} were planned.",
                    phase="update",
                    version=self._update.version,
                )
        self._update.all_moved()
