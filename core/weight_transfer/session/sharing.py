"""What goes by region: decided by rank 0, derived alike on every trainer rank, kept while it is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from weight_transfer.plan.exchange import OutgoingRegions, Taker
from weight_transfer.plan.layout import NONE, Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces
from weight_transfer.session.sent_pieces import SentPieces

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.session.rank_shards import RankShards


@attrs.frozen(eq=False)
class Keeper:
    """A worker, and what it keeps.

    Attributes:
        peer: its channel's address.
        worker: its number among all workers.
        kept: its regions; None if it has no targets, so that all it takes goes through its ``load_weights``.
    """

    peer: str
    worker: int
    kept: Regions | None

    def to_wire(self) -> list[Any]:
        """Return it JSON-safe; one that has targets."""
        assert self.kept is not None
        return [self.peer, self.worker, self.kept.to_wire()]

    @classmethod
    def from_wire(cls, data: list[Any], manifest: Manifest) -> Keeper:
        """Build it from `to_wire`."""
        return cls(str(data[0]), int(data[1]), Regions.from_wire(data[2], manifest))


def layout_for(ranks: Sequence[Regions], keepers: Sequence[Keeper]) -> Layout | None:
    """Decide what goes by region; None if nothing does.

    A weight does if all workers have targets for it and some trainer rank holds it as shards. What a single rank holds
    whole, each in one shard, and every worker keeps whole, goes whole: that is one copy for all of them.

    Args:
        ranks: what each holds, of one manifest.
        keepers: all workers.

    Raises:
        ManifestMismatchError: a weight's shards leave a gap, or overlap.
    """
    kept = [keeper.kept for keeper in keepers if keeper.kept is not None]
    if len(kept) < len(keepers) or not kept:
        return None
    layout = Layout.of(ranks)
    chosen = layout.pattern_of != NONE
    for regions in kept:
        chosen &= regions.pattern_of != NONE
    layout = layout.without(np.flatnonzero(~chosen))
    alone = len(ranks) == 1 and ranks[0].counts.max() <= 1
    if not chosen.any() or (alone and _all_whole(layout, kept)):
        return None
    return layout


def _all_whole(layout: Layout, kept: Sequence[Regions]) -> bool:
    chosen = layout.pattern_of != NONE
    parts = (attrs.evolve(regions, pattern_of=np.where(chosen, regions.pattern_of, NONE)) for regions in kept)
    return all(part.nbytes == layout.by_region.nbytes for part in parts)


class Sharing:
    """What one trainer rank gives by region, of one target.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._layout: Layout | None = None
        self._keepers: Sequence[Keeper] = ()
        self._outgoing: OutgoingRegions | None = None
        self._sent: SentPieces | None = None

    @property
    def layout(self) -> Layout | None:
        """What goes by region; None if nothing does."""
        return self._layout

    def plan(self, layout: Layout | None, keepers: Sequence[Keeper]) -> None:
        """Take the present layout and workers; the same objects while they are unchanged."""
        if layout is not self._layout or keepers is not self._keepers:
            self._layout, self._keepers, self._outgoing, self._sent = layout, keepers, None, None

    def outgoing(self, shards: RankShards) -> OutgoingRegions | None:
        """Return what this rank gives; the same object while nothing changed, and None if nothing goes by region."""
        layout = self._layout
        if layout is None:
            return None
        tensors: list[Tensor] = shards.tensors(layout)
        if self._outgoing is None or self._outgoing.tensors is not tensors:
            takers = [
                Taker(peer=keeper.peer, worker=keeper.worker, pieces=partial(self._pieces, layout, keeper))
                for keeper in self._keepers
            ]
            self._outgoing = OutgoingRegions(rank=self._rank, layout=layout, tensors=tensors, takers=takers)
        return self._outgoing

    def digests(self, outgoing: OutgoingRegions) -> dict[str, str]:
        """Return the `DigestTable` of the pieces that each worker takes, as text by its number as text.

        Workers that take nothing are absent. What several take is digested once.
        """
        if self._sent is None or self._sent.outgoing is not outgoing:
            self._sent = SentPieces(outgoing)
        return self._sent.tables()

    def _pieces(self, layout: Layout, keeper: Keeper) -> Pieces:
        assert keeper.kept is not None
        return plan_pieces(layout, keeper.kept, keeper.worker).of_rank(self._rank)
