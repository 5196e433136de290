"""The copies of an update by region on a GPU: planned once, and again when a target has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor

from weight_transfer.authoring import Boxes, Pieces, Tensors, boxes_of, has_kernel, sources_of, targets_of
from weight_transfer_ipc import cuda, piece_views
from weight_transfer_ipc.copies import OWN, PEER_BESIDE, Copies, Side
from weight_transfer_ipc.cuda_export import layouts
from weight_transfer_ipc.cuda_ring import read_buckets
from weight_transfer_ipc.region_plan import RankPlan

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, IncomingRegions
    from weight_transfer_ipc.trainers import Trainers

_PART = 1024  # targets whose places are compared before their copies are queued
_BATCH = 512 * 2**20  # bytes that torch's own copies move between two looks at the deadline and at the trainer


@attrs.frozen(eq=False)
class Origin:
    """What comes from one trainer rank, and the UUIDs of the GPUs on which each of its shards, and its ring, lie."""

    plan: RankPlan
    gpus: Sequence[str]
    ring_gpu: str


@attrs.frozen(eq=False)
class _Part:
    """Copies into some of the targets: their numbers, where these lay, and the copies by the GPU that they read."""

    targets: list[int]
    layout: object
    copies: dict[str, Copies]

    def is_unchanged(self, targets: Sequence[Tensor]) -> bool:
        return layouts([targets[number] for number in self.targets]) == self.layout


@attrs.frozen(eq=False)
class _Others:
    """Copies that torch makes: the pieces, and the part of its shard that each one is."""

    pieces: Pieces
    sources: list[Tensor]

    def copy(self, targets: Sequence[Tensor]) -> None:
        piece_views.copy(targets_of(self.pieces, targets), self.sources)


class _Mover:
    """Which pieces the kernel can move between some tensors and the targets, and how.

    Args:
        sources: tensors, as pieces count them as shards; None for those that no piece is of.
        gpus: the UUIDs of the GPUs on which they lie.
        targets: the worker's targets.
        device: the worker's.
        dims: as pieces have them.
    """

    def __init__(
        self,
        sources: Sequence[Tensor | None],
        gpus: Sequence[str],
        targets: Sequence[Tensor],
        device: torch.device,
        dims: int,
    ) -> None:
        self._sources, self._device = sources, device
        self._names = sorted(set(gpus))
        self._gpu = np.array([self._names.index(gpu) for gpu in gpus], dtype=np.int64)
        self._source_here = np.array([s is not None and s.device == device for s in sources], dtype=np.bool_)
        self._target_here = np.array([target.device == device for target in targets], dtype=np.bool_)
        self._source_columns, self._target_columns = _columns(sources, dims), _columns(targets, dims)

    def can_move(self, pieces: Pieces) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return a mask of the pieces that the kernel can move, if their bytes need no conversion."""
        if not has_kernel():
            return np.zeros(len(pieces), dtype=np.bool_)
        mask: np.ndarray[tuple[int], np.dtype[np.bool_]]
        mask = self._source_here[pieces.shard] & self._target_here[pieces.target]
        return mask

    def boxes(self, pieces: Pieces) -> dict[str, Boxes]:
        """Return the copies of pieces that the kernel can move, by the GPU that they read."""
        boxes = boxes_of(pieces, self._source_columns, self._target_columns)
        gpu = self._gpu[pieces.shard][boxes.piece]
        return {self._names[n]: boxes.where(np.flatnonzero(gpu == n)) for n in np.unique(gpu).tolist()}

    def others(self, pieces: Pieces) -> list[_Others]:
        """Return the copies of the other pieces, in batches of a bounded size."""
        batch = pieces.sizes.cumsum() // _BATCH
        own = (pieces.where(np.flatnonzero(batch == number)) for number in np.unique(batch).tolist())
        return [_Others(some, sources_of(some, self._sources)) for some in own]


@attrs.frozen(eq=False)
class _Ring:
    """What comes through the ring of a rank, by bucket."""

    rank: int
    targets: list[int]
    layout: object
    copies: list[Copies | None]
    others: list[list[_Others]]


class CudaRegions:
    """All copies of an update.

    Args:
        origins: what comes from where.
        targets: the worker's targets.
        device: the worker's.

    Attributes:
        lanes: the streams on which they run.
    """

    def __init__(self, origins: Sequence[Origin], targets: Sequence[Tensor], device: torch.device) -> None:
        self._device = device
        self._own = cuda.uuid_of(device.index)
        self._lanes: dict[str, torch.cuda.Stream] = {self._own: torch.cuda.Stream(device)}
        self._parts: list[_Part] = []
        self._others: list[_Others] = []
        self._rings: list[_Ring] = []
        self._plan(origins, targets)

    @property
    def lanes(self) -> list[torch.cuda.Stream]:
        return list(self._lanes.values())

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables of the copies take."""
        tables = [copies for part in self._parts for copies in part.copies.values()]
        tables += [copies for ring in self._rings for copies in ring.copies if copies is not None]
        return sum(copies.nbytes for copies in tables)

    def fits(self, targets: Sequence[Tensor]) -> bool:
        """Whether the targets of the rings are where they were; of the others `copy` says it."""
        return all(layouts([targets[number] for number in ring.targets]) == ring.layout for ring in self._rings)

    def copy(self, incoming: IncomingRegions) -> bool:
        """Queue what the kernel and the copy engines move; return False, half done, if a target has moved.

        Whether they have moved is asked part by part, while the GPU copies earlier ones.
        """
        for lane in self.lanes:
            lane.wait_stream(torch.cuda.current_stream())
        for part in self._parts:
            if not part.is_unchanged(incoming.targets):
                return False
            incoming.write_in_place()
            for gpu, copies in part.copies.items():
                lane = self._lanes[gpu]
                with torch.cuda.stream(lane):
                    copies.run(lane)
        return True

    def copy_others(self, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        """Copy, beside that, what torch converts or moves, and what comes through the rings."""
        with torch.cuda.stream(self._lanes[self._own]):
            for others in self._others:
                deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
                trainers.check_alive()
                incoming.write_in_place()
                others.copy(incoming.targets)
            for ring in self._rings:
                self._read(ring, incoming, trainers, deadline)

    def synchronise(self) -> None:
        """Wait for all that is queued: copies, which end by themselves."""
        for lane in self.lanes:
            lane.synchronize()

    def _read(self, ring: _Ring, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        lane = self._lanes[self._own]

        def load(index: int) -> None:
            incoming.write_in_place()
            copies = ring.copies[index]
            if copies is not None:
                copies.run(lane)
            for others in ring.others[index]:
                others.copy(incoming.targets)

        read_buckets(len(ring.copies), load, trainers[ring.rank], deadline)

    def _plan(self, origins: Sequence[Origin], targets: Sequence[Tensor]) -> None:
        count = -(-len(targets) // _PART)
        parts: list[list[tuple[list[int], dict[str, Boxes]]]] = [[] for _ in range(count)]
        for origin in origins:
            plan, pieces = origin.plan, origin.plan.pieces
            mover = _Mover(plan.shards, origin.gpus, targets, self._device, pieces.shape.shape[1])
            movable = mover.can_move(pieces) & plan.exact
            for number, part in enumerate(parts):
                chosen = np.flatnonzero(movable & (pieces.target // _PART == number))
                if len(chosen):
                    own = pieces.where(chosen)
                    part.append((own.target.tolist(), mover.boxes(own)))
            self._others += mover.others(pieces.where(np.flatnonzero(~movable)))
            if plan.blocks is not None:
                self._rings.append(self._ring(origin, targets))
        self._parts = [self._part(part, targets) for part in parts if part]

    def _part(self, found: list[tuple[list[int], dict[str, Boxes]]], targets: Sequence[Tensor]) -> _Part:
        numbers = sorted({number for numbers, _ in found for number in numbers})
        gpus = {gpu for _, boxes in found for gpu in boxes}
        copies = {}
        for gpu in sorted(gpus, key=lambda gpu: (gpu == self._own, gpu)):  # peers first: their copies take longest
            if gpu not in self._lanes:  # of a higher priority, or they would wait for all rows of the GPU's own
                self._lanes[gpu] = torch.cuda.Stream(self._device, priority=-1)
            boxes = Boxes.concatenated([boxes[gpu] for _, boxes in found if gpu in boxes])
            copies[gpu] = Copies(boxes, self._device, self._side_of(gpu))
        return _Part(numbers, layouts([targets[number] for number in numbers]), copies)

    def _side_of(self, gpu: str) -> Side:
        return OWN if gpu == self._own else PEER_BESIDE

    def _ring(self, origin: Origin, targets: Sequence[Tensor]) -> _Ring:
        plan = origin.plan
        assert plan.blocks is not None
        gpus = [origin.ring_gpu] * len(plan.staged_views)
        mover = _Mover(plan.staged_views, gpus, targets, self._device, plan.staged.shape.shape[1])
        copies: list[Copies | None] = []
        others = []
        side = self._side_of(origin.ring_gpu)
        for index in range(len(plan.blocks.plan.buckets)):
            pieces = plan.in_bucket(index)
            movable = mover.can_move(pieces)
            boxes = mover.boxes(pieces.where(np.flatnonzero(movable)))
            copies.append(Copies(boxes[origin.ring_gpu], self._device, side) if boxes else None)
            others.append(mover.others(pieces.where(np.flatnonzero(~movable))))
        numbers = sorted(set(plan.staged.target.tolist()))
        return _Ring(plan.rank, numbers, layouts([targets[number] for number in numbers]), copies, others)


def _columns(tensors: Sequence[Tensor | None], dims: int) -> Tensors:
    bases = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return Tensors.of(bases, [() if tensor is None else tensor.stride() for tensor in tensors], dims)
