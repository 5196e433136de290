"""The trainer's pipeline: while one batch is broadcast, the next one is packed."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.authoring import bucket_views, laid_out, uncast_tensors
from weight_transfer.errors import WeightsMovedError
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.pieces import Masters, StreamedBytes, piece_of
from weight_transfer_nccl.works import Work

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, WeightSource
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Batch, Layout, Plan


@attrs.frozen
class _Packing:
    """Where the small tensors of a batch are packed.

    Attributes:
        bucket: number of the bucket.
        data: what is broadcast of it, uint8.
        views: the place of each tensor.
        direct: the place of each piece of a large tensor, if these are converted and so have one.
    """

    bucket: int
    data: torch.Tensor
    views: list[torch.Tensor]
    direct: list[torch.Tensor]


@attrs.frozen
class _Cut:
    """The bytes of a batch.

    Attributes:
        packed: of each small tensor that is not packed yet.
        direct: of each piece of a large one.
        temporary: whether they are copies, which take memory until they have left.
    """

    packed: list[torch.Tensor]
    direct: list[torch.Tensor]
    temporary: bool


class _ResidentCut:
    """The bytes of a batch of tensors that stay where they are: looked up once."""

    def __init__(self, batch: Batch, tensors: list[torch.Tensor], device: torch.device) -> None:
        self._batch = batch
        self._tensors = [tensors[slot.param] for slot in (*batch.packed, *batch.direct)]
        self._device = device
        self._cut: _Cut | None = None
        self._addresses: list[int] = []

    def get(self) -> _Cut:
        """Return the bytes; of tensors that are not contiguous or lie elsewhere, copies.

        Raises:
            WeightsMovedError: they lay elsewhere when they were looked up.
        """
        if self._cut is not None:
            if _addresses(self._cut) != self._addresses:
                raise WeightsMovedError("Weights were moved meanwhile.", backend="nccl", phase="update", peer="trainer")
            return self._cut
        slots = (*self._batch.packed, *self._batch.direct)
        tensors = [laid_out(tensor.to(self._device)) for tensor in self._tensors]
        pieces = [piece_of(tensor, slot) for tensor, slot in zip(tensors, slots, strict=True)]
        count = len(self._batch.packed)
        copied = any(map(operator.is_not, tensors, self._tensors))
        cut = _Cut(pieces[:count], pieces[count:], temporary=copied)
        self._cut = None if copied else cut
        self._addresses = _addresses(cut)
        return cut


@attrs.frozen
class _Running:
    """A batch under way, the bytes that it still needs, and its bucket (None: it needs none)."""

    work: Work
    cut: _Cut
    bucket: int | None


class Sending:
    """Broadcasts plan after plan with the same buckets."""

    def __init__(self, layout: Layout, device: torch.device, buffers: Buffers) -> None:
        self._layout = layout
        self._device = device
        self._lane = Lane(device)
        self._plan: Plan | None = None
        self._converts = False
        self._buffers = buffers
        self._packings: list[_Packing | None] = []
        self._resident: Mapping[str, torch.Tensor] | None = None
        self._cuts: list[_ResidentCut] = []

    def send(
        self, group: Group, plan: Plan, source: WeightSource, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Broadcast every byte of ``source``; returns when all of them have left."""
        masters = uncast_tensors(source, plan.manifest.params)
        converts = masters is not None
        if self._plan is not plan or self._converts is not converts:
            self._prepare(plan, converts)
        running: deque[_Running] = deque()
        with group.guard(deadline):
            self._lane.after_caller()
            with self._lane:
                streamed = Masters(masters) if masters is not None else self._look_up(plan, source)
                for index, (batch, packing) in enumerate(zip(plan.batches, self._packings, strict=True)):
                    bucket = packing.bucket if packing is not None else None
                    while self._is_full(running, bucket):
                        running.popleft().work.wait()
                    if isinstance(streamed, Masters):
                        assert packing is not None
                        streamed.convert(batch, plan.manifest, [*packing.views, *packing.direct])
                        cut = _Cut([], packing.direct, temporary=False)
                    else:
                        cut = self._cuts[index].get() if streamed is None else _cut(streamed, batch)
                    data = cut.direct
                    if packing is not None and batch.packed:
                        if cut.packed:
                            torch._foreach_copy_(packing.views, cut.packed)
                        data = [packing.data, *data]
                    if not index:  # a source that fails at its first tensors costs the workers nothing
                        group.begin(deadline).wait()
                    running.append(_Running(group.broadcast(data, deadline), cut, bucket))
                    progress(batch.nbytes)
                while running:
                    running.popleft().work.wait()
            self._lane.finish(deadline, "broadcasting the weights")

    def _is_full(self, running: deque[_Running], bucket: int | None) -> bool:
        """Whether the oldest batch has to leave before the next one: its bucket or its copies' memory is needed."""
        copies = sum(batch.cut.temporary for batch in running)
        return (
            len(running) == WINDOW
            or copies >= self._layout.buckets
            or (bucket is not None and any(batch.bucket == bucket for batch in running))
        )

    def _prepare(self, plan: Plan, converts: bool) -> None:
        """Reserve the buckets that the plan needs, and give each batch its own; all of it, if it is converted."""
        self._plan, self._resident, self._cuts, self._converts = plan, None, [], converts
        needs = [batch.bucket_bytes if converts else batch.packed_bytes for batch in plan.batches]
        used = [max(need, 1) for need, batch in zip(needs, plan.batches, strict=True) if converts or batch.packed]
        self._buffers.reserve(max(used, default=0))
        self._packings = []
        for batch in plan.batches:
            packing = None
            if converts or batch.packed:
                bucket, buffer = self._buffers.take()
                data, views = buffer[: max(batch.packed_bytes, 1)], bucket_views(batch.packed, buffer)
                packing = _Packing(bucket, data, views, bucket_views(batch.direct, buffer) if converts else [])
            self._packings.append(packing)

    def _look_up(self, plan: Plan, source: WeightSource) -> StreamedBytes | None:
        """Find the source's tensors if all of them stay in place, else begin to iterate it."""
        resident = source.resident()
        if len(resident) != len(plan.manifest.params):
            return StreamedBytes(source, self._device)
        if self._resident is not resident:
            tensors = list(resident.values())
            self._cuts = [_ResidentCut(batch, tensors, self._device) for batch in plan.batches]
            self._resident = resident
        return None


def _addresses(cut: _Cut) -> list[int]:
    return [piece.data_ptr() for piece in (*cut.packed, *cut.direct)]


def _cut(streamed: StreamedBytes, batch: Batch) -> _Cut:
    return _Cut(streamed.pieces(batch.packed), streamed.pieces(batch.direct), temporary=True)
