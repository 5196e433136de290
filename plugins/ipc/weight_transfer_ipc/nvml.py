"""What NVIDIA's management library says about this machine's GPUs. Unlike CUDA, asking it has no side effect.

It sees every GPU, whatever ``CUDA_VISIBLE_DEVICES`` says.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_uint, c_void_p

_READ = 0  # NVML_P2P_CAPS_INDEX_READ
_SIGNATURES: dict[str, list[object]] = {
    "nvmlInit_v2": [],
    "nvmlShutdown": [],
    "nvmlDeviceGetCount_v2": [POINTER(c_uint)],
    "nvmlDeviceGetHandleByIndex_v2": [c_uint, POINTER(c_void_p)],
    "nvmlDeviceGetMigMode": [c_void_p, POINTER(c_uint), POINTER(c_uint)],
    "nvmlDeviceGetP2PStatus": [c_void_p, c_void_p, c_int, POINTER(c_int)],
}


def describe_gpus() -> tuple[int, str]:
    """Return the number of GPUs, and in words how far they can read each other's memory."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError):
        return 0, "no NVIDIA driver"
    if code := library.nvmlInit_v2():
        return 0, f"the NVIDIA driver does not answer (NVML error {code})"
    try:
        return _describe(library)
    finally:
        library.nvmlShutdown()


def _describe(library: ctypes.CDLL) -> tuple[int, str]:
    count = c_uint()
    library.nvmlDeviceGetCount_v2(byref(count))
    gpus = []
    for index in range(count.value):
        gpu = c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, byref(gpu)) == 0:
            gpus.append((index, gpu))
    if not gpus:
        return 0, "no GPU"
    notes = []
    for index, gpu in gpus:
        mode, pending = c_uint(), c_uint()
        if library.nvmlDeviceGetMigMode(gpu, byref(mode), byref(pending)) == 0 and mode.value:
            notes.append(f"GPU {index} is cut into slices (MIG), which share no memory with each other")
    for index, gpu in gpus:
        for other, peer in gpus:
            status = c_int()
            if index != other and (library.nvmlDeviceGetP2PStatus(gpu, peer, _READ, byref(status)) or status.value):
                notes.append(f"GPU {index} cannot read GPU {other}'s memory")
    counted = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
    reach = ", each can read the others' memory" if len(gpus) > 1 else ""
    return len(gpus), f"{counted}; {'; '.join(notes)}" if notes else counted + reach
