"""What the core hands to the engines on either side of an update by region."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import attrs
from torch import Tensor

from weight_transfer.plan.layout import Layout
from weight_transfer.plan.pieces import Pieces


class IncomingRegions(ABC):
    """What a worker receives by region in one update; the core's, given to `receive_regions`.

    Attributes:
        layout: which trainer ranks hold what; the same object while that is unchanged.
        pieces: what comes from where into which target; the same object while layout and targets are unchanged.
        targets: the worker's own tensors, as ``pieces.target`` counts them, of the manifest's dtypes, with any strides;
            the same object while each of them is the same one, and lies where and as it lay. They may have been moved
            since the last update though ``pieces`` is the same.
    """

    layout: Layout
    pieces: Pieces
    targets: Sequence[Tensor]

    @abstractmethod
    def write_in_place(self) -> None:
        """Say that bytes are about to be written; raises after the deadline or an abort."""

    @abstractmethod
    def moved(self, rank: int, nbytes: int) -> None:
        """Say that bytes of a trainer rank have been written into their targets."""


class Taker:
    """One worker, as a trainer rank sees it in an update by region.

    Args:
        peer: the channel's address, for messages and `lose_worker`.
        worker: its number among all workers, from 0; its ``rank_offset + parallel_config.rank - 1``.
        pieces: what it takes of this rank, or what plans that when it is first asked for: most workers pull, and then
            nobody asks.
    """

    def __init__(self, *, peer: str, worker: int, pieces: Pieces | Callable[[], Pieces]) -> None:
        self.peer = peer
        self.worker = worker
        self._pieces = pieces

    @property
    def pieces(self) -> Pieces:
        """What the worker takes of this rank; what it plans itself for this rank, in the same order."""
        if not isinstance(self._pieces, Pieces):
            self._pieces = self._pieces()
        return self._pieces


@attrs.frozen(kw_only=True, eq=False)
class OutgoingRegions:
    """What a trainer rank gives by region; the same object from update to update while nothing in it changes.

    Attributes:
        rank: of this trainer rank.
        layout: which ranks hold what.
        tensors: this rank's shards, as ``pieces.shard`` counts them (`Layout.shards`), with any strides. Where a dtype
            is not the manifest's, the bytes are to be converted, with the bits of ``tensor.to``.
        takers: all workers that are joined, those included that take nothing of this rank.
    """

    rank: int
    layout: Layout
    tensors: Sequence[Tensor]
    takers: Sequence[Taker]
