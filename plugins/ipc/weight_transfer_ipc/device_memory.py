"""Device memory that torch did not allocate, as tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import torch

_CPU, _CUDA, _UINT = 1, 2, 1  # kDLCPU, kDLCUDA and kDLUInt of dlpack.h


class _Tensor(Structure):
    """``DLManagedTensor`` of dlpack.h, for one dimension, with room for its length."""

    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
        ("manager", c_void_p),
        ("deleter", c_void_p),
        ("length", c_int64),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = c_void_p, [c_size_t]
_new_capsule: Any = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return ``nbytes`` bytes at ``address`` as a uint8 tensor on ``device``; the caller keeps the memory valid.

    Why DLPack: it lets memory of a peer GPU count as the device that has mapped it. torch takes the device of a
    ``__cuda_array_interface__`` from the pointer, and so would open a context on the peer, which may not even be
    visible in this process.
    """
    block = _libc.malloc(ctypes.sizeof(_Tensor))
    if not block:
        raise MemoryError
    tensor = _Tensor.from_address(block)
    ctypes.memset(block, 0, ctypes.sizeof(_Tensor))
    tensor.data, tensor.length = address, nbytes
    tensor.device_type, tensor.device_id = (_CUDA, device.index or 0) if device.type == "cuda" else (_CPU, 0)
    tensor.ndim, tensor.code, tensor.bits, tensor.lanes = 1, _UINT, 8, 1
    tensor.shape = ctypes.cast(block + _Tensor.length.offset, POINTER(c_int64))
    tensor.deleter = ctypes.cast(_libc.free, c_void_p).value  # torch frees the block, not the memory
    view: torch.Tensor = torch.utils.dlpack.from_dlpack(_new_capsule(block, b"dltensor", None))
    return view
