"""The trainer's weights on GPUs: exported where they lie, by handles that travel with the update info."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import plan_buckets, staged_tensors
from weight_transfer_ipc import cuda
from weight_transfer_ipc.cuda_export import CudaExporter, Readiness
from weight_transfer_ipc.cuda_ring import CudaRingWriter
from weight_transfer_ipc.infos import DeviceMemory
from weight_transfer_ipc.ring import RingLayout

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import BucketPlan, Deadline, Export, Manifest, WeightSource, WeightTransferConfig
    from weight_transfer_ipc.connection import Connection


class CudaWriter:
    """Exports update after update from the same memory.

    Args:
        config: the trainer's.
        device: where the ring lies; exported weights may lie on any GPU.
    """

    def __init__(self, config: WeightTransferConfig, device: torch.device) -> None:
        options = config.options
        self._config = config
        self._device = device
        self._keep_mapped: bool = options.keep_mapped
        self._exporter = CudaExporter(options.export == "adopt", refuse=options.unexportable == "refuse")
        self._readiness = Readiness()
        self._export: Export | None = None
        self._staged: Manifest | None = None
        self._plan: BucketPlan | None = None
        self._memory: DeviceMemory | None = None
        self._ring: CudaRingWriter | None = None
        self._old_rings: list[CudaRingWriter] = []
        self._gpus: dict[int, object] = {}

    @property
    def extra_memory(self) -> int:
        """Bytes of the ring."""
        return self._ring.layout.nbytes if self._ring is not None else 0

    @property
    def tolerates_moves(self) -> bool:
        """Whether workers alone read the weights, out of memory that is kept for them."""
        return self._ring is None and self._keep_mapped

    def welcome(self, rank: int, gpu: object) -> None:
        """A worker of this GPU has joined: whatever it needs comes with the update info."""
        self._gpus[rank] = gpu

    def describe(self, source: WeightSource, manifest: Manifest) -> dict[str, Any]:
        """Return the fields of the update info; orders the update after the caller's current stream."""
        export = self._exporter.refresh(manifest, self._readable(source))
        if export is not self._export:
            self._export, self._staged = export, export.staged(manifest)
            self._fit_ring(self._staged)
            self._plan = plan_buckets(self._staged.params, self._ring.layout.bucket_bytes) if self._ring else None
        ready = self._readiness.mark(self._exporter.devices)
        allocations = self._exporter.allocations + ((self._ring.allocation,) if self._ring else ())
        memory = DeviceMemory(allocations, ready)
        if memory != self._memory:
            self._memory = memory
        return {
            "export": export,
            "device_memory": self._memory,
            "ring": self._ring.layout if self._ring else None,
            "keep_mapped": self._keep_mapped,
        }

    def send(
        self,
        source: WeightSource,
        workers: dict[int, Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Send what is staged; the workers fetch the rest by themselves."""
        if self._ring is not None:
            assert self._staged is not None and self._plan is not None
            tensors = staged_tensors(source, self._staged.params)
            kept = not source.reuses_memory
            self._ring.write(self._plan, tensors, list(workers.values()), deadline, progress, kept)

    def _readable(self, source: WeightSource) -> Mapping[str, torch.Tensor]:
        """Return what workers may read in place: masters, too, if no larger bytes than the cast ones leave the GPU."""
        masters, resident = source.masters(), source.resident()
        if not masters or any(gpu != cuda.uuid_of(self._device.index) for gpu in self._gpus.values()):
            return resident
        return {**resident, **{name: tensor for name, tensor in masters.items() if tensor.device == self._device}}

    def release(self) -> None:
        """No worker maps old memory any more, or, if so configured, any."""
        self._exporter.release()
        for ring in self._old_rings:
            ring.close()
        self._old_rings.clear()
        if not self._keep_mapped:
            self.close()

    def close(self) -> None:
        """Give everything back."""
        self._exporter.close()
        self._export = self._staged = self._plan = self._memory = None
        for ring in [*self._old_rings, *([self._ring] if self._ring else [])]:
            ring.close()
        self._old_rings, self._ring = [], None

    def _fit_ring(self, staged: Manifest) -> None:
        """Have a ring for ``staged``, or none."""
        layout = RingLayout.fitting(staged, self._config.bucket_bytes, self._config.buckets) if staged.params else None
        if self._ring is not None and self._ring.layout != layout:
            self._old_rings.append(self._ring)
            self._ring = None
        if self._ring is None and layout is not None:
            self._ring = CudaRingWriter(layout, self._device)
