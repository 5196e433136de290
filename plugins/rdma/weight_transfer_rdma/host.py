"""Weights in host memory: they lie in shared memory, and the agent is a process of its own that maps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.authoring import ALIGNMENT, Export, Exporter, Segment, SharedMemory
from weight_transfer_rdma.memory import Arena, Located
from weight_transfer_rdma.nixl import REGIONS, WHOLE, Place
from weight_transfer_rdma.plan import Regions
from weight_transfer_rdma.process import AgentProcess

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer_rdma.config import RdmaOptions


class HostMemory:
    """A `Memory` of shared segments, into which weights are adopted."""

    def __init__(self, options: RdmaOptions) -> None:
        self.place = Place()
        self._options = options
        self._exporters = {plan: Exporter(adopt=options.adopt) for plan in (WHOLE, REGIONS)}
        self._agent: AgentProcess | None = None
        self._arenas: list[SharedMemory] = []
        self._known: dict[str, tuple[Export, Located]] = {}
        self.moved = False

    def start_agent(self, name: str, peer: str, reads: bool, deadline: Deadline) -> AgentProcess:
        self._known.clear()
        self._arenas.clear()
        self._agent = AgentProcess(name, self._options, peer, deadline)
        return self._agent

    def locate(
        self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], deadline: Deadline, plan: str = WHOLE
    ) -> Located:
        export = self._exporters[plan].refresh(manifest, tensors)
        self.moved = self._exporters[plan].moved
        known = self._known.pop(plan, None)
        if known is None or known[0] is not export:
            known = export, self._located(plan, export, manifest, tensors, deadline)
        self._known[plan] = known
        return known[1]

    @property
    def parted(self) -> bool:
        return any(exporter.parted for exporter in self._exporters.values())

    def arena(self, nbytes: int, deadline: Deadline) -> Arena:
        assert self._agent is not None
        memory = SharedMemory(nbytes)
        self._arenas.append(memory)
        return Arena(memory.storage(0, nbytes), self._agent.share(memory, deadline))

    def free(self, arena: Arena, deadline: Deadline) -> None:
        address = arena.data.data_ptr()
        self._arenas = [memory for memory in self._arenas if memory.address != address]
        self._unshare([], deadline)

    def words(self, nbytes: int, deadline: Deadline) -> Arena:
        return self.arena(nbytes, deadline)

    def settle(self) -> None:
        return

    def settle_copies(self) -> None:
        return

    def close(self) -> None:
        self._agent = None
        self._known.clear()
        self._arenas.clear()
        for exporter in self._exporters.values():
            exporter.close()

    def _unshare(self, used: list[SharedMemory], deadline: Deadline) -> None:
        """Take back all segments but these, those of other plans, and the arenas."""
        assert self._agent is not None
        others = [self._exporters[plan].segment(segment.id) for plan in self._known for segment in self._export(plan)]
        self._agent.unshare_all_but([*used, *others, *self._arenas], deadline)

    def _export(self, plan: str) -> tuple[Segment, ...]:
        return self._known[plan][0].segments

    def _located(
        self,
        plan: str,
        export: Export,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
        deadline: Deadline,
    ) -> Located:
        assert self._agent is not None
        exporter = self._exporters[plan]
        self._unshare([exporter.segment(segment.id) for segment in export.segments], deadline)
        bases, regions = {}, []
        for segment in export.segments:
            memory = exporter.segment(segment.id)
            bases[segment.id] = self._agent.share(memory, deadline)
            regions.append((bases[segment.id], memory.nbytes))
        addresses = [
            bases[segment] + offset if segment >= 0 and str(index) not in export.strides else -1
            for index, (segment, offset) in enumerate(zip(export.segment_ids, export.offsets, strict=True))
        ]
        padding = [
            _padding(tensors[param.name]) if address >= 0 else 0
            for param, address in zip(manifest.params, addresses, strict=True)
        ]
        return Located(np.array(addresses, dtype=np.int64), np.array(padding, dtype=np.int64), Regions.of(regions))


def _padding(tensor: torch.Tensor) -> int:
    """Return how many bytes lie between the end of an adopted tensor and the next storage; 0 inside its own."""
    storage = tensor.untyped_storage()
    end = tensor.storage_offset() * tensor.element_size() + tensor.nbytes
    return -end % ALIGNMENT if end == storage.nbytes() else 0
