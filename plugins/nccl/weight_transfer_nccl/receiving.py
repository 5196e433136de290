"""A worker's pipeline: while one batch is loaded, the next ones arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.buckets import Slot, as_bytes, bucket_views, typed_view
from weight_transfer.loading import destinations_of
from weight_transfer.manifest import torch_dtype
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.pieces import ResidentBytes

if TYPE_CHECKING:
    from weight_transfer.deadline import Deadline
    from weight_transfer.engine import LoadWeights
    from weight_transfer.manifest import Manifest
    from weight_transfer_nccl.group import Group, Work
    from weight_transfer_nccl.plan import Batch, Layout, Plan

_WHAT = "receiving the weights"

Weights = list[tuple[str, torch.Tensor]]


@attrs.frozen
class _Landing:
    """Where a batch arrives.

    Attributes:
        data: uint8 tensors, one for each broadcast.
        bucket: number of the bucket that holds some of them; None: all arrive in the worker's own tensors.
        whole: the parameters that are complete once it has arrived.
        parts: pieces of others, in the bucket.
    """

    data: list[torch.Tensor]
    bucket: int | None
    whole: Weights
    parts: list[tuple[Slot, torch.Tensor]]


class Receiving:
    """Receives plan after plan with the same buckets."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._arriving = Lane(device)
        self._loading = Lane(device)
        self._plan: Plan | None = None
        self._destinations: Mapping[str, torch.Tensor] | None = None
        self._resident: ResidentBytes | None = None
        self._buffers: Buffers | None = None
        self._landings: list[_Landing] = []
        self._loaded: dict[int, Any] = {}
        self._partial: dict[int, torch.Tensor] = {}

    @property
    def extra_memory(self) -> int:
        """Bytes of the buckets."""
        return self._buffers.nbytes if self._buffers is not None else 0

    def receive(self, group: Group, plan: Plan, load_weights: LoadWeights, deadline: Deadline) -> None:
        """Receive and load every parameter; returns when all are in place."""
        self._prepare(plan, destinations_of(load_weights))
        write_in_place: Callable[[], None] | None = getattr(load_weights, "write_in_place", None)
        posted: deque[tuple[_Landing, Work]] = deque()
        self._partial = {}
        with group.guard(deadline, _WHAT):
            self._arriving.after_caller()
            self._loading.after_caller()
            for landing in self._landings:
                bucket = landing.bucket
                while len(posted) == WINDOW or (
                    bucket is not None and any(other.bucket == bucket for other, _ in posted)
                ):
                    self._load(*posted.popleft(), plan.manifest, load_weights)
                if self._resident is not None and write_in_place is not None:
                    write_in_place()
                if bucket is not None:
                    self._arriving.after(self._loaded.get(bucket))
                with self._arriving:
                    posted.append((landing, group.broadcast(landing.data, deadline)))
            while posted:
                self._load(*posted.popleft(), plan.manifest, load_weights)
            self._loading.finish(deadline, _WHAT)

    def _prepare(self, plan: Plan, destinations: Mapping[str, torch.Tensor] | None) -> None:
        """Decide where every batch arrives, unless that is known from the last update."""
        tensors = None if destinations is None else [destinations[param.name] for param in plan.manifest.params]
        known = self._resident is not None and tensors is not None and self._resident.still_of(tensors)
        if self._plan is plan and self._destinations is destinations and (known or tensors is None):
            return
        self._plan, self._destinations = plan, destinations
        self._resident = ResidentBytes(tensors, self._device) if tensors is not None else None
        places = [self._places(batch) for batch in plan.batches]
        needs = [_need(batch, own) for batch, own in zip(plan.batches, places, strict=True)]
        bucket_bytes = max((need for need in needs if need is not None), default=0)
        if self._buffers is None or self._buffers.bucket_bytes < bucket_bytes:
            self._buffers, self._loaded = Buffers(self._layout.buckets, bucket_bytes, self._device), {}
        self._landings = [
            self._land(batch, own, need, plan.manifest)
            for batch, own, need in zip(plan.batches, places, needs, strict=True)
        ]

    def _places(self, batch: Batch) -> list[torch.Tensor | None]:
        """Return for each piece of a large tensor its bytes in the worker's own one, or None."""
        return [None if self._resident is None else self._resident.piece(slot) for slot in batch.direct]

    def _land(self, batch: Batch, own: list[torch.Tensor | None], need: int | None, manifest: Manifest) -> _Landing:
        bucket, buffer = (None, None) if need is None or self._buffers is None else self._buffers.take()
        data: list[torch.Tensor] = []
        whole: Weights = []
        parts: list[tuple[Slot, torch.Tensor]] = []
        if batch.packed and buffer is not None:
            data.append(buffer[: max(batch.packed_bytes, 1)])
            for slot, view in zip(batch.packed, bucket_views(batch.packed, buffer), strict=True):
                meta = manifest.params[slot.param]
                whole.append((meta.name, typed_view(view, meta)))
        for slot, place in zip(batch.direct, own, strict=True):
            meta = manifest.params[slot.param]
            if place is not None and self._destinations is not None:
                data.append(place)
                if slot.last:
                    whole.append((meta.name, self._destinations[meta.name]))
            elif buffer is not None:
                view = buffer[slot.offset : slot.offset + slot.nbytes]
                data.append(view)
                if slot.last and not slot.start:
                    whole.append((meta.name, typed_view(view, meta)))
                else:
                    parts.append((slot, view))
        return _Landing(data, bucket, whole, parts)

    def _load(self, landing: _Landing, work: Work, manifest: Manifest, load_weights: LoadWeights) -> None:
        with self._loading:
            work.wait()
            complete = landing.whole + [
                done for slot, view in landing.parts for done in self._assemble(slot, view, manifest)
            ]
            if complete:
                load_weights(complete)
        if landing.bucket is not None:
            self._loaded[landing.bucket] = self._loading.mark()

    def _assemble(self, slot: Slot, view: torch.Tensor, manifest: Manifest) -> Weights:
        """Add a piece to its tensor, a temporary one; return that once it is whole."""
        meta = manifest.params[slot.param]
        if not slot.start:
            self._partial[slot.param] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device=self._device)
        as_bytes(self._partial[slot.param])[slot.start : slot.start + slot.nbytes].copy_(view)
        return [(meta.name, self._partial.pop(slot.param))] if slot.last else []


def _need(batch: Batch, own: list[torch.Tensor | None]) -> int | None:
    """Return how many bytes of a bucket a batch needs; None if it arrives in the worker's own tensors."""
    if any(place is None for place in own):
        return batch.bucket_bytes
    return max(batch.packed_bytes, 1) if batch.packed else None
