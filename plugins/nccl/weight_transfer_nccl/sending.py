"""The trainer's pipeline: while one batch is broadcast, the next one is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.buckets import bucket_views
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.group import Work
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.pieces import ResidentBytes, StreamedBytes

if TYPE_CHECKING:
    from weight_transfer.deadline import Deadline
    from weight_transfer.source import WeightSource
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Batch, Layout, Plan

_WHAT = "broadcasting the weights"


@attrs.frozen
class _Packing:
    """Where the small tensors of a batch are packed.

    Attributes:
        bucket: number of the bucket.
        data: what is broadcast of it, uint8.
        views: the place of each tensor.
    """

    bucket: int
    data: torch.Tensor
    views: list[torch.Tensor]


@attrs.frozen
class _Cut:
    """The bytes of a batch: of each small tensor, and of each piece of a large one."""

    packed: list[torch.Tensor]
    direct: list[torch.Tensor]


@attrs.frozen
class _Running:
    """A batch under way, the tensors that it still needs, and its bucket (None: it needs none)."""

    work: Work
    cut: _Cut
    bucket: int | None


class Sending:
    """Broadcasts plan after plan with the same buckets."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._lane = Lane(device)
        self._plan: Plan | None = None
        self._buffers: Buffers | None = None
        self._packings: list[_Packing | None] = []
        self._resident: ResidentBytes | None = None
        self._cuts: list[_Cut] = []

    @property
    def extra_memory(self) -> int:
        """Bytes of the buckets."""
        return self._buffers.nbytes if self._buffers is not None else 0

    def send(
        self, group: Group, plan: Plan, source: WeightSource, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Broadcast every byte of ``source``; returns when all of them have left."""
        if self._plan is not plan:
            self._prepare(plan)
        streamed = None if self._look_up(plan, source) else StreamedBytes(source, self._device)
        running: deque[_Running] = deque()
        with group.guard(deadline, _WHAT):
            self._lane.after_caller()
            with self._lane:
                for index, (batch, packing) in enumerate(zip(plan.batches, self._packings, strict=True)):
                    bucket = packing.bucket if packing is not None else None
                    while len(running) == WINDOW or (bucket is not None and any(r.bucket == bucket for r in running)):
                        running.popleft().work.wait()
                    cut = self._cuts[index] if streamed is None else _cut(streamed, batch)
                    data = cut.direct
                    if packing is not None:
                        torch._foreach_copy_(packing.views, cut.packed)
                        data = [packing.data, *data]
                    running.append(_Running(group.broadcast(data, deadline), cut, bucket))
                    progress(batch.nbytes)
                while running:
                    running.popleft().work.wait()
            self._lane.finish(deadline, _WHAT)

    def _prepare(self, plan: Plan) -> None:
        """Reserve the buckets that the plan needs, and give each batch its own."""
        self._plan, self._resident, self._cuts = plan, None, []
        bucket_bytes = max((max(batch.packed_bytes, 1) for batch in plan.batches if batch.packed), default=0)
        if self._buffers is None or self._buffers.bucket_bytes < bucket_bytes:
            self._buffers = Buffers(self._layout.buckets, bucket_bytes, self._device)
        self._packings = []
        for batch in plan.batches:
            packing = None
            if batch.packed:
                bucket, buffer = self._buffers.take()
                packing = _Packing(bucket, buffer[: max(batch.packed_bytes, 1)], bucket_views(batch.packed, buffer))
            self._packings.append(packing)

    def _look_up(self, plan: Plan, source: WeightSource) -> bool:
        """Find the bytes of the source's tensors, if all of them stay in place."""
        tensors = list(source.resident().values())
        if len(tensors) != len(plan.manifest.params):
            return False
        if self._resident is None or not self._resident.still_of(tensors):
            self._resident, self._cuts = ResidentBytes(tensors, self._device), []
            if self._resident.complete:
                self._cuts = [_cut_resident(self._resident, batch) for batch in plan.batches]
        return self._resident.complete


def _cut_resident(resident: ResidentBytes, batch: Batch) -> _Cut:
    packed, direct = (
        [piece for slot in slots if (piece := resident.piece(slot)) is not None]
        for slots in (batch.packed, batch.direct)
    )
    return _Cut(packed, direct)


def _cut(streamed: StreamedBytes, batch: Batch) -> _Cut:
    return _Cut(streamed.pieces(batch.packed), streamed.pieces(batch.direct))
