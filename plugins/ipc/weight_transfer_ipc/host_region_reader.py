"""A worker's view of trainer ranks whose shards lie in host memory: maps their segments and copies its regions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from weight_transfer.authoring import HostCopies, sources_of, targets_of
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_ipc import piece_views
from weight_transfer_ipc.host_segments import receive_segments
from weight_transfer_ipc.region_plan import RankPlan
from weight_transfer_ipc.ring import RING, read_buckets
from weight_transfer_ipc.shares import Share

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, IncomingRegions, Pieces, PrivateView
    from weight_transfer_ipc.infos import IpcUpdateInfo
    from weight_transfer_ipc.trainers import Trainers

_BATCH = 64 * 2**20  # bytes between two looks at the deadline and at the trainer


@attrs.frozen(eq=False)
class _Batch:
    """Pieces of a rank: bytes, and copies of the part of its shard that each one is to the part of its target."""

    rank: int
    nbytes: int
    copies: HostCopies

    def copy(self, incoming: IncomingRegions) -> None:
        incoming.write_in_place()
        with torch.no_grad():
            self.copies.run()
        incoming.moved(self.rank, self.nbytes)


class HostRegionReader:
    """Reads update after update from the same mappings."""

    extra_memory = 0
    mapped_allocations = 0

    def __init__(self) -> None:
        self._memory: dict[int, dict[int, PrivateView]] = {}
        self._shares: Sequence[Any] | None = None
        self._pieces: Pieces | None = None
        self._targets: Sequence[Tensor] | None = None
        self._plans: list[RankPlan] = []
        self._batches: list[_Batch] = []
        self._rings: list[tuple[int, list[_Batch]]] = []

    def read(self, info: IpcUpdateInfo, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        """Write every piece."""
        trainers.check_alive()
        if info.shares is not self._shares or incoming.pieces is not self._pieces:
            self._map(info, incoming, trainers, deadline)
        if incoming.targets is not self._targets:
            self._plan(incoming.targets)
            self._targets = incoming.targets
        for batch in self._batches:
            deadline.check("copying from shared memory", backend="ipc", phase="update")
            trainers.check_alive()
            batch.copy(incoming)
        for rank, buckets in self._rings:
            load = partial(_load, buckets, incoming)
            read_buckets(len(buckets), load, trainers[rank], deadline)
        trainers.check_alive()

    def close(self) -> None:
        """Unmap everything."""
        self._forget()
        self._memory.clear()

    def _map(self, info: IpcUpdateInfo, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        """Map what is new of those ranks from which something comes, and make the views."""
        self._forget()
        if info.shares is None or len(info.shares) != len(trainers):
            raise ManifestMismatchError("An update by region came without the shares of all trainer ranks.")
        for rank in sorted(set(incoming.pieces.rank.tolist())):
            share = Share.from_wire(info.shares[rank], rank)
            if share.device_memory is not None:
                raise ManifestMismatchError("The trainer exports device memory to a worker on the CPU.", backend="ipc")
            sizes = {segment.id: segment.nbytes for segment in share.export.segments}
            if share.ring is not None:
                sizes[RING] = share.ring.nbytes
            known = self._memory.get(rank, {})
            self._memory[rank] = receive_segments(known, sizes, trainers[rank], deadline)
            memory = {segment: view.data for segment, view in self._memory[rank].items()}
            self._plans.append(RankPlan.of(incoming, rank, share, memory))
        self._shares, self._pieces = info.shares, incoming.pieces

    def _plan(self, targets: Sequence[Tensor]) -> None:
        """Make the views; those of the targets are by address, for they may be freed before the next update."""
        self._batches, self._rings = [], []
        unowned = [piece_views.unowned(target) for target in targets]
        for plan in self._plans:
            which = plan.pieces.sizes.cumsum() // _BATCH
            for number in np.unique(which).tolist():
                pieces = plan.pieces.where(np.flatnonzero(which == number))
                self._batches.append(_batch(plan.rank, pieces, plan.shards, unowned))
            if plan.blocks is not None:
                buckets = map(plan.in_bucket, range(len(plan.blocks.plan.buckets)))
                batches = [_batch(plan.rank, pieces, plan.staged_views, unowned) for pieces in buckets]
                self._rings.append((plan.rank, batches))

    def _forget(self) -> None:
        self._shares, self._pieces, self._targets = None, None, None
        self._plans, self._batches, self._rings = [], [], []


def _load(buckets: Sequence[_Batch], incoming: IncomingRegions, index: int) -> None:
    buckets[index].copy(incoming)


def _batch(rank: int, pieces: Pieces, shards: Sequence[Tensor | None], targets: Sequence[Tensor]) -> _Batch:
    copies = HostCopies(targets_of(pieces, targets), sources_of(pieces, shards))
    return _Batch(rank, pieces.nbytes, copies)
