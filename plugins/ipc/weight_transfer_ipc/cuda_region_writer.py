"""A trainer rank's shards on GPUs: exported where they lie, by handles that travel with the update info."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer_ipc.cuda_export import CudaExporter, Readiness
from weight_transfer_ipc.cuda_ring import CudaRingWriter
from weight_transfer_ipc.infos import DeviceMemory
from weight_transfer_ipc.region_writer import RegionWriter
from weight_transfer_ipc.ring import RingLayout

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, Export, Manifest, WeightTransferConfig
    from weight_transfer_ipc.blocks import Blocks
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.shares import Share, TakenShards


class CudaRegionWriter(RegionWriter):
    """Shares device memory.

    Args:
        config: the trainer's.
        device: where the ring lies; exported shards may lie on any GPU.
    """

    def __init__(self, config: WeightTransferConfig, device: torch.device) -> None:
        super().__init__(config)
        options = config.options
        self._device = device
        self._keep_mapped: bool = options.keep_mapped
        self._exporter = CudaExporter(options.export == "adopt", refuse=options.unexportable == "refuse")
        self._readiness = Readiness()
        self._ring: CudaRingWriter | None = None
        self._old_rings: list[CudaRingWriter] = []

    @property
    def extra_memory(self) -> int:
        return self._ring.layout.nbytes if self._ring is not None else 0

    def release(self) -> None:
        """No worker maps old memory any more, or, if so configured, any."""
        self._exporter.release()
        for ring in self._old_rings:
            ring.close()
        self._old_rings.clear()
        if not self._keep_mapped:
            self.close()

    def close(self) -> None:
        self._exporter.close()
        self._forget()
        for ring in [*self._old_rings, *([self._ring] if self._ring else [])]:
            ring.close()
        self._old_rings, self._ring = [], None

    def _refreshed(self, taken: TakenShards) -> Export:
        return self._exporter.refresh(taken.manifest, taken.tensors)

    def _described(self, share: Share) -> Share:
        ready = self._readiness.mark(self._exporter.devices)
        allocations = self._exporter.allocations + ((self._ring.allocation,) if self._ring else ())
        return attrs.evolve(share, device_memory=DeviceMemory(allocations, ready), keep_mapped=self._keep_mapped)

    def _ring_for(self, staged: Manifest) -> RingLayout | None:
        layout = RingLayout.fitting(staged, self._config.bucket_bytes, self._config.buckets) if staged.params else None
        if self._ring is not None and self._ring.layout != layout:
            self._old_rings.append(self._ring)
            self._ring = None
        if self._ring is None and layout is not None:
            self._ring = CudaRingWriter(layout, self._device)
        return layout

    def _write(
        self,
        blocks: Blocks,
        tensors: Sequence[Any],
        readers: Sequence[Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        assert self._ring is not None
        self._ring.write(blocks.plan, blocks.of_shards(tensors, self._staged), readers, deadline, progress, kept=True)
