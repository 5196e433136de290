"""What NVIDIA's management library says about this machine's GPUs. Unlike CUDA, asking it has no side effect.

It sees every GPU, whatever ``CUDA_VISIBLE_DEVICES`` says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_uint, c_void_p

import attrs

_READ = 0  # NVML_P2P_CAPS_INDEX_READ
_SIGNATURES: dict[str, list[object]] = {
    "nvmlInit_v2": [],
    "nvmlShutdown": [],
    "nvmlSystemGetCudaDriverVersion_v2": [POINTER(c_int)],
    "nvmlDeviceGetCount_v2": [POINTER(c_uint)],
    "nvmlDeviceGetHandleByIndex_v2": [c_uint, POINTER(c_void_p)],
    "nvmlDeviceGetMigMode": [c_void_p, POINTER(c_uint), POINTER(c_uint)],
    "nvmlDeviceGetP2PStatus": [c_void_p, c_void_p, c_int, POINTER(c_int)],
}


@attrs.frozen(kw_only=True)
class Gpus:
    """The GPUs of this machine.

    Attributes:
        indices: of those that answer, as the driver counts them.
        cuda: ``(major, minor)`` of the newest CUDA that the driver supports; None without a driver.
        sliced: indices of those that are cut into slices (MIG).
        apart: ``(reader, owner)`` of those that cannot read each other's memory.
        missing: why there are none, in words.
    """

    indices: Sequence[int] = ()
    cuda: tuple[int, int] | None = None
    sliced: Sequence[int] = ()
    apart: Sequence[tuple[int, int]] = ()
    missing: str = ""

    def __str__(self) -> str:
        if not self.indices:
            return self.missing
        count = f"{len(self.indices)} GPU{'s' if len(self.indices) > 1 else ''}"
        notes = [f"GPU {gpu} is cut into slices (MIG), which share no memory with each other" for gpu in self.sliced]
        notes += [f"GPU {reader} cannot read GPU {owner}'s memory" for reader, owner in self.apart]
        reach = ", each can read the others' memory" if len(self.indices) > 1 else ""
        return f"{count}; {'; '.join(notes)}" if notes else count + reach


def find_gpus() -> Gpus:
    """Ask the driver for its GPUs."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError):
        return Gpus(missing="no NVIDIA driver")
    if code := library.nvmlInit_v2():
        return Gpus(missing=f"the NVIDIA driver does not answer (NVML error {code})")
    try:
        return _ask(library)
    finally:
        library.nvmlShutdown()


def _ask(library: ctypes.CDLL) -> Gpus:
    version, count = c_int(), c_uint()
    library.nvmlSystemGetCudaDriverVersion_v2(byref(version))
    cuda = version.value // 1000, version.value % 1000 // 10
    library.nvmlDeviceGetCount_v2(byref(count))
    handles = {}
    for index in range(count.value):
        gpu = c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, byref(gpu)) == 0:
            handles[index] = gpu
    return Gpus(
        indices=tuple(handles),
        cuda=cuda,
        sliced=[index for index, gpu in handles.items() if _is_sliced(library, gpu)],
        apart=[
            (index, other)
            for index, gpu in handles.items()
            for other, peer in handles.items()
            if index != other and not _reads(library, gpu, peer)
        ],
        missing="" if handles else "no GPU",
    )


def _is_sliced(library: ctypes.CDLL, gpu: c_void_p) -> bool:
    mode, pending = c_uint(), c_uint()
    return library.nvmlDeviceGetMigMode(gpu, byref(mode), byref(pending)) == 0 and mode.value != 0


def _reads(library: ctypes.CDLL, gpu: c_void_p, peer: c_void_p) -> bool:
    status = c_int()
    return library.nvmlDeviceGetP2PStatus(gpu, peer, _READ, byref(status)) == 0 and status.value == 0
