"""The trainer's pipeline: while one bucket is broadcast, the next one is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.buckets import Slot, as_bytes, bucket_views, pack
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.group import Work
from weight_transfer_nccl.lanes import Lane

if TYPE_CHECKING:
    from weight_transfer.deadline import Deadline
    from weight_transfer.source import WeightSource
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Broadcast, Layout, Plan

_WHAT = "broadcasting the weights"


@attrs.frozen
class _Running:
    """A broadcast under way, the tensors that it still needs, and its bucket (-1: none)."""

    work: Work
    parts: list[torch.Tensor]
    bucket: int


class Sending:
    """Broadcasts plan after plan with the same buckets.

    Attributes:
        buffers: the buckets.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.buffers = Buffers(layout, device)
        self._device = device
        self._lane = Lane(device)
        self._plan: Plan | None = None
        self._views: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def send(
        self, group: Group, plan: Plan, source: WeightSource, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Broadcast every byte of ``source``; returns when all of them have left."""
        if self._plan is not plan:
            self._plan, self._views = plan, {}
        self.buffers.rewind()
        tensors = _Reader(source, self._device)
        running: deque[_Running] = deque()
        with group.guard(deadline, _WHAT):
            self._lane.after_caller()
            with self._lane:
                for index, broadcast in enumerate(plan.broadcasts):
                    bucket = -1 if broadcast.direct else self.buffers.next
                    while len(running) == WINDOW or (bucket >= 0 and any(r.bucket == bucket for r in running)):
                        running.popleft().work.wait()
                    parts = [tensors.get(slot.param) for slot in broadcast.slots]
                    data = self._direct(broadcast, parts) if broadcast.direct else self._pack(index, broadcast, parts)
                    running.append(_Running(group.broadcast(data, deadline), parts, bucket))
                    tensors.forget(broadcast.slots)
                    progress(broadcast.nbytes)
                while running:
                    running.popleft().work.wait()
            self._lane.finish(deadline, _WHAT)

    @staticmethod
    def _direct(broadcast: Broadcast, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        slot = broadcast.slots[0]
        return as_bytes(parts[0])[slot.start : slot.start + slot.nbytes]

    def _pack(self, index: int, broadcast: Broadcast, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        _, buffer = self.buffers.take()
        if index not in self._views:
            self._views[index] = buffer[: max(broadcast.nbytes, 1)], bucket_views(broadcast.slots, buffer)
        data, views = self._views[index]
        pack(broadcast.slots, parts, views)
        return data


class _Reader:
    """Reads a source in order and keeps each tensor until its last byte has been posted."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(source)
        self._device = device
        self._held: dict[int, torch.Tensor] = {}
        self._read = 0

    def get(self, param: int) -> torch.Tensor:
        while self._read <= param:
            _, tensor = next(self._tensors)
            self._held[self._read] = tensor.to(self._device).contiguous()
            self._read += 1
        return self._held[param]

    def forget(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.last:
                del self._held[slot.param]
