"""A worker's reads by region: planned once over all trainer ranks, done in every update."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from weight_transfer.authoring import ALIGNMENT, structure
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_rdma.giving import as_params
from weight_transfer_rdma.info import WORD, Share, ring_counter
from weight_transfer_rdma.memory import Arena
from weight_transfer_rdma.nixl import REGIONS
from weight_transfer_rdma.reading import DEPTH, Job, Reading
from weight_transfer_rdma.taking import Draft, Keep, RankReads

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, IncomingRegions, WeightTransferConfig
    from weight_transfer_rdma.memory import Memory, RunningAgent
    from weight_transfer_rdma.nixl import Rows

_MOST = 16 * 2**20  # bytes of a staging bucket for what is read where it lies
_DEEPEST = 64  # reads under way

Stage = Callable[[int], Arena]
"""Returns staging memory of at least so many bytes."""


class RegionReads:
    """The plan of a worker's updates by region, and how far it has read the rings of the trainer's ranks.

    Args:
        config: the worker's.
        memory: in which the targets lie.
        worker: the worker's number.
    """

    def __init__(self, config: WeightTransferConfig, memory: Memory, worker: int) -> None:
        self._config, self._memory, self._worker = config, memory, worker
        self._raw: Sequence[dict[str, Any]] | None = None
        self._shares: tuple[Share, ...] = ()
        self._planned: tuple[object, ...] | None = None
        self._where: list[tuple[object, ...]] = []
        self._targets: Sequence[torch.Tensor] = ()
        self._jobs: list[Job] = []
        self._buffers = self._depth = 0
        self._buckets: dict[int, int] = {}
        self._read: dict[int, tuple[str, int, int]] = {}

    def forget(self) -> None:
        """Drop the plan: what it was made for has changed."""
        self._planned, self._jobs, self._targets, self._where = None, [], (), []

    def shares(self, raw: Sequence[dict[str, Any]] | None, incoming: IncomingRegions) -> tuple[Share, ...]:
        """Return what the trainer's ranks say, the same objects while it is the same.

        Raises:
            ManifestMismatchError: not every rank says something.
        """
        if raw is None or len(raw) != len(incoming.layout.places):
            raise ManifestMismatchError(
                f"The layout has {len(incoming.layout.places)} trainer ranks, of which {len(raw or ())} said where "
                "their shards are.",
                backend="rdma",
            )
        if self._raw is None or (self._raw is not raw and self._raw != raw):
            self._shares = tuple(structure(each, Share, f"shares[{rank}]") for rank, each in enumerate(raw))
        self._raw = raw
        return self._shares

    def fits(self, incoming: IncomingRegions) -> bool:
        """Whether the plan is one for these pieces and targets, where they are now."""
        planned = incoming.layout, incoming.pieces, self._shares
        if self._planned is None or not all(map(operator.is_, planned, self._planned)):
            return False
        if incoming.targets is self._targets:
            return True
        if list(map(_place, incoming.targets)) != self._where:  # our memory may have moved them itself, into a segment
            return False
        self._targets = incoming.targets
        return True

    def plan(self, agent: RunningAgent, incoming: IncomingRegions, stage: Stage, deadline: Deadline) -> None:
        """Prepare all reads."""
        self.forget()
        located = self._memory.locate(*as_params(incoming.targets), deadline, REGIONS)
        agent.release(deadline, REGIONS)
        keep = Keep.of(incoming, located, self._memory.place)
        staged_bytes = min(self._config.bucket_bytes // ALIGNMENT * ALIGNMENT, _MOST)
        ranks = np.unique(incoming.pieces.rank).tolist()
        drafts: list[Draft] = []
        self._buckets = {}
        for rank in ranks:
            share, pieces = self._shares[rank], incoming.pieces.of_rank(rank)
            reads = RankReads(
                rank, share, self._worker, pieces, keep, staged_bytes, self._preparing(agent, share, deadline)
            )
            if reads.buckets:
                filled = share.endpoint.flags + ring_counter(self._worker) * WORD
                agent.attach_flags(share.endpoint.agent, filled, filled + WORD, deadline, REGIONS)
                self._buckets[rank] = reads.buckets
            drafts += reads.drafts()
        drafts.sort(key=lambda draft: (draft.turn, (draft.rank - self._worker) % len(self._shares)))
        self._depth = min(DEPTH[self._memory.place.memory] * len(ranks), _DEEPEST)
        buffers = self._cut([draft.buffer_bytes for draft in drafts if draft.buffer_bytes], stage)
        turns = cycle(buffers)
        self._buffers = len(buffers)
        self._jobs = [draft.make(next(turns) if draft.buffer_bytes else None) for draft in drafts]
        self._targets = () if self._memory.moved else incoming.targets
        self._where = list(map(_place, incoming.targets))
        self._planned = incoming.layout, incoming.pieces, self._shares

    def reading(self, agent: RunningAgent, incoming: IncomingRegions, deadline: Deadline) -> Reading:
        """Return the reads of an update."""
        return Reading(
            agent,
            self._jobs,
            self._buffers,
            {rank: self._read_of(rank) for rank in self._buckets},
            incoming,
            self._memory.settle_copies,
            deadline,
            self._depth,
        )

    def end(self) -> None:
        """Note that everything was read."""
        for rank, buckets in self._buckets.items():
            share = self._shares[rank]
            self._read[rank] = share.endpoint.agent, share.turn, self._read_of(rank) + buckets

    def _read_of(self, rank: int) -> int:
        """Return how many buckets of a rank's ring were read, since its counters began anew."""
        share = self._shares[rank]
        agent, turn, buckets = self._read.get(rank, ("", 0, 0))
        return buckets if (agent, turn) == (share.endpoint.agent, share.turn) else 0

    def _cut(self, needed: list[int], stage: Stage) -> list[Arena]:
        """Return staging buckets for jobs that need so many bytes each."""
        if not needed:
            return []
        stride = -(-max(needed) // ALIGNMENT) * ALIGNMENT
        room = self._config.buckets * self._config.bucket_bytes // stride
        count = min(max(room, 2), self._depth, len(needed))
        arena = stage(stride * count)
        return [
            Arena(arena.data[first : first + stride], arena.address + first)
            for first in range(0, stride * count, stride)
        ]

    def _preparing(self, agent: RunningAgent, share: Share, deadline: Deadline) -> Callable[[Rows], int]:
        endpoint, place = share.endpoint, self._memory.place
        return lambda rows: agent.prepare("READ", endpoint.agent, rows, place, endpoint.place, deadline, REGIONS)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.stride(), tensor.dtype
