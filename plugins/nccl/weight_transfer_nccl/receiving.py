"""A worker's pipeline: while one bucket is loaded, the next ones arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.buckets import Slot, as_bytes, bucket_views, typed_view
from weight_transfer.loading import destinations_of
from weight_transfer.manifest import torch_dtype
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.group import Work
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.plan import Broadcast

if TYPE_CHECKING:
    from weight_transfer.deadline import Deadline
    from weight_transfer.engine import LoadWeights
    from weight_transfer.manifest import Manifest
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Layout, Plan

_WHAT = "receiving the weights"

Weights = list[tuple[str, torch.Tensor]]


@attrs.frozen
class _Arrival:
    """A broadcast that was posted: its place in the plan, its bytes and its bucket (-1: received in place)."""

    index: int
    broadcast: Broadcast
    data: torch.Tensor
    work: Work
    bucket: int


class Receiving:
    """Receives plan after plan with the same buckets.

    Attributes:
        buffers: the buckets.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.buffers = Buffers(layout, device)
        self._device = device
        self._arriving = Lane(device)
        self._loading = Lane(device)
        self._plan: Plan | None = None
        self._weights: dict[int, Weights] = {}
        self._loaded: dict[int, Any] = {}

    def receive(self, group: Group, plan: Plan, load_weights: LoadWeights, deadline: Deadline) -> None:
        """Receive and load every parameter; returns when all are in place."""
        if self._plan is not plan:
            self._plan, self._weights = plan, {}
        self.buffers.rewind()
        places = _Places(plan.manifest, load_weights, self._device)
        posted: deque[_Arrival] = deque()
        with group.guard(deadline, _WHAT):
            self._arriving.after_caller()
            self._loading.after_caller()
            for index, broadcast in enumerate(plan.broadcasts):
                own = places.own(broadcast.slots[0]) if broadcast.direct else None
                bucket = self.buffers.next if own is None else -1
                while len(posted) == WINDOW or (bucket >= 0 and any(arrival.bucket == bucket for arrival in posted)):
                    self._load(posted.popleft(), places, load_weights)
                posted.append(self._post(group, index, broadcast, own, deadline))
            while posted:
                self._load(posted.popleft(), places, load_weights)
            self._loading.finish(deadline, _WHAT)

    def _post(
        self, group: Group, index: int, broadcast: Broadcast, own: torch.Tensor | None, deadline: Deadline
    ) -> _Arrival:
        bucket, data = -1, own
        if data is None:
            bucket, buffer = self.buffers.take()
            self._arriving.after(self._loaded.get(bucket))
            data = buffer[: max(broadcast.nbytes, 1)]
        with self._arriving:
            return _Arrival(index, broadcast, data, group.broadcast(data, deadline), bucket)

    def _load(self, arrival: _Arrival, places: _Places, load_weights: LoadWeights) -> None:
        with self._loading:
            arrival.work.wait()
            if not arrival.broadcast.direct:
                complete = self._views(arrival, places.manifest)
            elif arrival.bucket < 0:
                complete = places.complete(arrival.broadcast.slots[0])
            else:
                complete = places.add(arrival.broadcast.slots[0], arrival.data)
            if complete:
                load_weights(complete)
        if arrival.bucket >= 0:
            self._loaded[arrival.bucket] = self._loading.mark()

    def _views(self, arrival: _Arrival, manifest: Manifest) -> Weights:
        if arrival.index not in self._weights:
            slots = arrival.broadcast.slots
            metas = [manifest.params[slot.param] for slot in slots]
            views = bucket_views(slots, arrival.data)
            self._weights[arrival.index] = [(m.name, typed_view(v, m)) for m, v in zip(metas, views, strict=True)]
        return self._weights[arrival.index]


class _Places:
    """Where pieces of large tensors go: the worker's own tensors if its loader only copies, else new ones."""

    def __init__(self, manifest: Manifest, load_weights: LoadWeights, device: torch.device) -> None:
        self.manifest = manifest
        self._destinations = destinations_of(load_weights) or {}
        self._write_in_place: Callable[[], None] = getattr(load_weights, "write_in_place", lambda: None)
        self._device = device
        self._partial: dict[int, torch.Tensor] = {}

    def own(self, slot: Slot) -> torch.Tensor | None:
        """Return the bytes of the worker's own tensor that a piece may be received into, or None."""
        tensor = self._destinations.get(self.manifest.params[slot.param].name)
        if tensor is None or not tensor.is_contiguous() or tensor.device != self._device:
            return None
        self._write_in_place()
        return as_bytes(tensor)[slot.start : slot.start + slot.nbytes]

    def complete(self, slot: Slot) -> Weights:
        """Return the worker's own tensor once its last piece has arrived in place."""
        name = self.manifest.params[slot.param].name
        return [(name, self._destinations[name])] if slot.last else []

    def add(self, slot: Slot, data: torch.Tensor) -> Weights:
        """Take a piece that arrived in a bucket; return the tensor once it is whole."""
        meta = self.manifest.params[slot.param]
        if slot.last and not slot.start:
            return [(meta.name, typed_view(data, meta))]
        if not slot.start:
            self._partial[slot.param] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device=self._device)
        tensor = self._partial[slot.param]
        as_bytes(tensor)[slot.start : slot.start + slot.nbytes].copy_(data)
        return [(meta.name, self._partial.pop(slot.param))] if slot.last else []
