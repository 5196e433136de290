"""Which of the trainer's CUDA tensors the workers read in place, and where they lie.

CUDA exports whole allocations (torch's blocks), so a handle stands for all tensors in one. Nothing moves. Memory that
has been exported must not be freed under a reader: the exporter keeps it alive until the workers have let go of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weight_transfer.authoring import Export, Segment, dtype_name
from weight_transfer.errors import BackendUnavailableError
from weight_transfer_ipc import cuda
from weight_transfer_ipc.infos import Allocation

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest

logger = logging.getLogger(__name__)

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class CudaExporter:
    """The trainer's exported device memory.

    Args:
        export: whether tensors may be read in place; if not, everything is staged.
        refuse: whether memory that CUDA cannot export is an error instead of being staged.

    Attributes:
        allocations: what is exported now.
        devices: where, as torch counts.
    """

    def __init__(self, export: bool, refuse: bool) -> None:
        self._may_export = export
        self._refuse = refuse
        self._ids = count(1)
        self._resident: Mapping[str, Tensor] | None = None
        self._manifest: Manifest | None = None
        self._signature: object = None
        self._export = Export((), (), (), {})
        self._held: list[Any] = []
        self._retired: list[Any] = []
        self.allocations: tuple[Allocation, ...] = ()
        self.devices: tuple[int, ...] = ()

    def refresh(self, manifest: Manifest, resident: Mapping[str, Tensor]) -> Export:
        """Return where the weights are now; the same object while nothing moved.

        Args:
            manifest: the weights.
            resident: their tensors, by name; the same mapping only while none of them has moved.

        Raises:
            BackendUnavailableError: memory cannot be exported, and that is to be refused.
        """
        if resident is self._resident and manifest is self._manifest:
            return self._export
        tensors = tuple(resident.values())
        signature = manifest.digest, layouts(tensors), [tensor.dtype for tensor in tensors]
        if signature != self._signature:
            self._export = self._describe(manifest, resident)
        self._signature, self._resident, self._manifest = signature, resident, manifest
        return self._export

    def release(self) -> None:
        """All workers have mapped the present export: let go of what they do not map any more."""
        self._retired.clear()

    def close(self) -> None:
        """Let go of everything."""
        self._held, self._signature, self._resident, self._manifest = [], None, None, None
        self._export, self.allocations = Export((), (), (), {}), ()
        self.devices = ()
        self.release()

    def _describe(self, manifest: Manifest, resident: Mapping[str, Tensor]) -> Export:
        known = {(allocation.gpu, allocation.handle): allocation for allocation in self.allocations}
        used: dict[tuple[int, int], Allocation] = {}
        ids, offsets, strides, dtypes, stuck = [], [], {}, {}, []
        held = []
        for index, param in enumerate(manifest.params):
            tensor = resident.get(param.name)
            allocation = None
            if tensor is not None and self._may_export and _is_plain(tensor):
                allocation = self._allocation(tensor, used, known)
                if allocation is None:
                    stuck.append(param.name)
            ids.append(allocation.id if allocation else -1)
            offsets.append(tensor.data_ptr() - allocation.address if tensor is not None and allocation else 0)
            if tensor is not None and allocation:
                held.append(tensor.untyped_storage())
                if not tensor.is_contiguous():
                    strides[str(index)] = tensor.stride()
                if dtype_name(tensor.dtype) != param.dtype:
                    dtypes[str(index)] = dtype_name(tensor.dtype)
        if stuck:
            self._complain(stuck, len(manifest.params))
        self._retired += self._held
        self._held = held
        self.allocations = tuple(used.values())
        self.devices = tuple(sorted({device for device, _ in used}))
        segments = tuple(Segment(allocation.id, allocation.nbytes) for allocation in self.allocations)
        return Export(segments, tuple(ids), tuple(offsets), strides, dtypes)

    def _allocation(
        self,
        tensor: Tensor,
        used: dict[tuple[int, int], Allocation],
        known: Mapping[tuple[str, str], Allocation],
    ) -> Allocation | None:
        """Return the allocation in which a tensor lies, or None if CUDA cannot export it."""
        address, device = tensor.data_ptr(), tensor.device.index
        if not cuda.is_exportable(address):
            return None
        begin, nbytes = cuda.allocation_at(address, device)
        if (device, begin) not in used:
            try:
                gpu, handle = cuda.uuid_of(device), cuda.export(begin, device)
            except cuda.CudaValueError:  # what virtual memory answers, whatever its attributes say; it is staged
                return None
            used[device, begin] = known.get((gpu, handle)) or Allocation(next(self._ids), gpu, nbytes, handle, begin)
        return used[device, begin]

    def _complain(self, stuck: Sequence[str], total: int) -> None:
        reason = (
            f"{len(stuck)} of {total} tensors, such as {stuck[0]!r}, lie in memory that CUDA cannot export: torch's "
            "expandable segments, cudaMallocAsync, or another allocator's"
        )
        fix = (
            "Take expandable_segments and backend:cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF, or set "
            'unexportable = "stage" in [weight_transfer.ipc].'
        )
        if self._refuse:
            raise BackendUnavailableError(f"{reason}. {fix}", name="ipc", reason=reason, fix=fix)
        logger.warning("%s. They go through the ring of buckets, at two copies per byte.", reason)


class Readiness:
    """Interprocess events that tell the workers when the weights may be read, one for each GPU."""

    def __init__(self) -> None:
        self._events: dict[int, Any] = {}
        self._handles: dict[int, str] = {}

    def mark(self, devices: Sequence[int]) -> dict[str, str]:
        """Order the events after the caller's current streams; return their handles by the UUID of the GPU."""
        handles = {}
        for device in devices:
            if device not in self._events:
                with torch.cuda.device(device):
                    self._events[device] = torch.cuda.Event(interprocess=True)
            self._events[device].record(torch.cuda.current_stream(device))
            if device not in self._handles:
                self._handles[device] = self._events[device].ipc_handle().hex()
            handles[cuda.uuid_of(device)] = self._handles[device]
        return handles


def layouts(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Return what changes when one of ``tensors`` moves or is laid out anew: made to be quick for thousands."""
    contiguous = list(map(Tensor.is_contiguous, tensors))
    others = [tensor.stride() for tensor, plain in zip(tensors, contiguous, strict=True) if not plain]
    return list(map(Tensor.data_ptr, tensors)), contiguous, others


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.device.type == "cuda" and tensor.numel() > 0
    return plain and not (tensor.is_conj() or tensor.is_neg())  # whose bytes are not their values
