"""The trainer's pipeline: while one bucket is broadcast, the next one is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.buckets import as_bytes, bucket_views
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
    pieces: list[torch.Tensor]
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
        self._resident: _Resident | None = None
        self._views: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def send(
        self, group: Group, plan: Plan, source: WeightSource, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Broadcast every byte of ``source``; returns when all of them have left."""
        if self._plan is not plan:
            self._plan, self._views, self._resident = plan, {}, None
        self.buffers.rewind()
        self._resident = _Resident.of(plan, source, self._device, self._resident)
        tensors = self._resident or _Reader(source, self._device)
        running: deque[_Running] = deque()
        with group.guard(deadline, _WHAT):
            self._lane.after_caller()
            with self._lane:
                for index, broadcast in enumerate(plan.broadcasts):
                    bucket = -1 if broadcast.direct else self.buffers.next
                    while len(running) == WINDOW or (bucket >= 0 and any(r.bucket == bucket for r in running)):
                        running.popleft().work.wait()
                    pieces = tensors.pieces(broadcast)
                    data = pieces[0] if broadcast.direct else self._pack(index, broadcast, pieces)
                    running.append(_Running(group.broadcast(data, deadline), pieces, bucket))
                    progress(broadcast.nbytes)
                while running:
                    running.popleft().work.wait()
            self._lane.finish(deadline, _WHAT)

    def _pack(self, index: int, broadcast: Broadcast, pieces: list[torch.Tensor]) -> torch.Tensor:
        _, buffer = self.buffers.take()
        if index not in self._views:
            self._views[index] = buffer[: max(broadcast.nbytes, 1)], bucket_views(broadcast.slots, buffer)
        data, views = self._views[index]
        torch._foreach_copy_(views, pieces)
        return data


class _Reader:
    """Gives out the bytes of a source's tensors, in order, and keeps each until its last byte has been posted."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(source)
        self._device = device
        self._held: dict[int, torch.Tensor] = {}
        self._read = 0

    def pieces(self, broadcast: Broadcast) -> list[torch.Tensor]:
        """Return the bytes that a broadcast carries, a uint8 tensor for each slot."""
        pieces = [self._bytes(slot.param)[slot.start : slot.start + slot.nbytes] for slot in broadcast.slots]
        for slot in broadcast.slots:
            if slot.last:
                del self._held[slot.param]
        return pieces

    def _bytes(self, param: int) -> torch.Tensor:
        while self._read <= param:
            _, tensor = next(self._tensors)
            self._held[self._read] = as_bytes(tensor.to(self._device).contiguous())
            self._read += 1
        return self._held[param]


class _Resident:
    """The same for tensors that stay where they are: their bytes are looked up once, not at every update.

    It keeps their memory alive, so that an address always means the same tensor; one that was reallocated lets go of
    its old memory at the next update.
    """

    def __init__(self, plan: Plan, tensors: Sequence[torch.Tensor]) -> None:
        self._where = _where(tensors)
        data = [as_bytes(tensor) for tensor in tensors]
        self._pieces = {
            id(broadcast): [data[slot.param][slot.start : slot.start + slot.nbytes] for slot in broadcast.slots]
            for broadcast in plan.broadcasts
        }

    @classmethod
    def of(cls, plan: Plan, source: WeightSource, device: torch.device, known: _Resident | None) -> _Resident | None:
        """Return ``known`` if it still holds, a new one if all of the source's tensors stay in place, else None."""
        resident = source.resident()
        if len(resident) != len(plan.manifest.params):
            return None
        tensors = list(resident.values())
        if known is not None and known._where == _where(tensors):  # noqa: SLF001  (one of ours)
            return known
        if any(tensor.device != device or not tensor.is_contiguous() for tensor in tensors):
            return None
        return cls(plan, tensors)

    def pieces(self, broadcast: Broadcast) -> list[torch.Tensor]:
        """See `_Reader`."""
        return self._pieces[id(broadcast)]


def _where(tensors: Sequence[torch.Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    return [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
