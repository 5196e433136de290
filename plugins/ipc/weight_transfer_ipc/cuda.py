"""The calls of CUDA's driver API that torch does not offer, through ctypes. This module does not import torch.

Addresses are plain numbers, devices the ordinals that torch counts by (``CUDA_VISIBLE_DEVICES`` applies to both). Every
call works in the device's primary context, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache

from weight_transfer.errors import BackendUnavailableError, TransferError

LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64

# Numbers from cuda.h.
_IS_LEGACY_IPC_CAPABLE = 10  # CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Handle(Structure):
    _fields_ = [("data", c_ubyte * HANDLE_BYTES)]


class _Uuid(Structure):
    _fields_ = [("data", c_ubyte * 16)]


class _Location(Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _CopyAttributes(Structure):
    _fields_ = [("order", c_int), ("source", _Location), ("target", _Location), ("flags", c_uint)]


_SIGNATURES: dict[str, list[object]] = {
    "cuInit": [c_uint],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGetUuid": [POINTER(_Uuid), c_int],
    "cuDeviceGetUuid_v2": [POINTER(_Uuid), c_int],
    "cuDeviceCanAccessPeer": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemGetAddressRange_v2": [POINTER(c_uint64), POINTER(c_size_t), c_uint64],
    "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
    "cuIpcGetMemHandle": [POINTER(_Handle), c_uint64],
    "cuIpcOpenMemHandle_v2": [POINTER(c_uint64), _Handle, c_uint],
    "cuIpcCloseMemHandle": [c_uint64],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}


_BATCH = "cuMemcpyBatchAsync"
_BATCH_SIGNATURE = [
    POINTER(c_uint64),
    POINTER(c_uint64),
    POINTER(c_size_t),
    c_size_t,
    POINTER(_CopyAttributes),
    POINTER(c_size_t),
    c_size_t,
    POINTER(c_size_t),
    c_void_p,
]


class CudaMemoryError(TransferError):
    """The GPU has no memory left."""


class CudaValueError(TransferError):
    """CUDA does not do this with that memory."""


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(
            "CUDA tensors need the NVIDIA driver, and a recent one; install it, or move the weights to the CPU.",
            cause=str(error),
        ) from error
    code = library.cuInit(0)
    if code:
        raise BackendUnavailableError(
            "CUDA tensors need a working NVIDIA driver; see nvidia-smi.", cause=f"cuInit answered {code}"
        )
    return library


def _call(what: str, name: str, *arguments: object) -> None:
    """Call a function of the driver.

    Raises:
        TransferError: it failed; ``what`` was being done.
    """
    library = _library()
    code = getattr(library, name)(*arguments)
    if code:
        text, number = c_char_p(), c_char_p()
        library.cuGetErrorName(code, byref(number))
        library.cuGetErrorString(code, byref(text))
        words = (number.value or b"?").decode(), (text.value or b"an unknown error").decode()
        kind = {_INVALID_VALUE: CudaValueError, _OUT_OF_MEMORY: CudaMemoryError}.get(code, TransferError)
        raise kind(f"CUDA failed to {what}.", backend="ipc", cause=f"{name}: {words[0]} ({code}), {words[1]}")


@cache
def _context(device: int) -> c_void_p:
    """Return the primary context of a device; it is retained until the process ends, as torch does."""
    context = c_void_p()
    _call("open a device", "cuDevicePrimaryCtxRetain", byref(context), _handle_of(device))
    return context


@cache
def _handle_of(device: int) -> int:
    handle = c_int()
    _call("find a device", "cuDeviceGet", byref(handle), device)
    return handle.value


@contextmanager
def _on(device: int) -> Iterator[None]:
    _call("enter a device's context", "cuCtxPushCurrent_v2", _context(device))
    try:
        yield
    finally:
        _call("leave a device's context", "cuCtxPopCurrent_v2", byref(c_void_p()))


@cache
def uuid_of(device: int) -> str:
    """Return the UUID of a device as 32 hexadecimal digits; of the slice, if it is one (MIG)."""
    uuid = _Uuid()
    _call("read a device's UUID", "cuDeviceGetUuid_v2", byref(uuid), _handle_of(device))
    return bytes(uuid.data).hex()


@cache
def is_slice(device: int) -> bool:
    """Whether a device is a slice of a GPU (MIG): then it has another UUID than its GPU."""
    uuid = _Uuid()
    _call("read a GPU's UUID", "cuDeviceGetUuid", byref(uuid), _handle_of(device))
    return bytes(uuid.data).hex() != uuid_of(device)


def find(uuid: str) -> int | None:
    """Return the visible device of that UUID, or None: processes may see different devices of one host."""
    count = c_int()
    _call("count the devices", "cuDeviceGetCount", byref(count))
    return next((device for device in range(count.value) if uuid_of(device) == uuid), None)


def can_access(device: int, peer: int) -> bool:
    """Whether ``device`` can read the memory of ``peer``."""
    answer = c_int()
    _call("ask for peer access", "cuDeviceCanAccessPeer", byref(answer), _handle_of(device), _handle_of(peer))
    return bool(answer.value)


def is_exportable(address: int) -> bool:
    """Whether the allocation at ``address`` can be shared by `export`; virtual and pooled memory cannot."""
    answer = c_int()
    pointer = ctypes.cast(byref(answer), c_void_p)
    _call("look at an allocation", "cuPointerGetAttribute", pointer, _IS_LEGACY_IPC_CAPABLE, address)
    return bool(answer.value)


def allocation_at(address: int, device: int) -> tuple[int, int]:
    """Return the beginning and the size in bytes of the allocation in which ``address`` lies."""
    begin, size = c_uint64(), c_size_t()
    with _on(device):
        _call("look an allocation up", "cuMemGetAddressRange_v2", byref(begin), byref(size), address)
    return begin.value, size.value


def export(address: int, device: int) -> str:
    """Return the handle of the allocation that begins at ``address``, as hexadecimal text.

    Raises:
        CudaValueError: CUDA cannot export it; see also `is_exportable`.
    """
    handle = _Handle()
    with _on(device):
        _call("export an allocation", "cuIpcGetMemHandle", byref(handle), address)
    return bytes(handle.data).hex()


def open_handle(handle: str, device: int) -> int:
    """Map an allocation of another process for ``device``, a peer's too; return its address here."""
    address = c_uint64()
    data = _Handle((c_ubyte * HANDLE_BYTES).from_buffer_copy(bytes.fromhex(handle)))
    with _on(device):
        what = "map the trainer's memory"
        _call(what, "cuIpcOpenMemHandle_v2", byref(address), data, _LAZY_PEER_ACCESS)
    return address.value


def close_handle(address: int, device: int) -> None:
    """Undo one `open_handle`."""
    with _on(device):
        _call("unmap the trainer's memory", "cuIpcCloseMemHandle", address)


def allocate(nbytes: int, device: int) -> int:
    """Reserve exportable memory and return its address.

    Raises:
        CudaMemoryError: there is not enough.
    """
    address = c_uint64()
    with _on(device):
        _call(f"reserve {nbytes} bytes", "cuMemAlloc_v2", byref(address), nbytes)
    return address.value


def free(address: int, device: int) -> None:
    """Give back what `allocate` reserved; waits for the device."""
    with _on(device):
        _call("give memory back", "cuMemFree_v2", address)


class Batch:
    """Copies that the GPU's copy engines make, queued by one call (`has_batches`).

    Args:
        sources: addresses.
        targets: addresses.
        sizes: bytes.
    """

    def __init__(self, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]) -> None:
        self._count = len(sizes)
        self._sources = (c_uint64 * self._count)(*sources)
        self._targets = (c_uint64 * self._count)(*targets)
        self._sizes = (c_size_t * self._count)(*sizes)
        self._attributes = (_CopyAttributes * 1)()
        self._attributes[0].order = _IN_STREAM_ORDER
        self._first = (c_size_t * 1)(0)

    def run(self, stream: int, device: int) -> None:
        """Queue all copies on a stream (``torch.cuda.Stream.cuda_stream``; not the default one) of ``device``."""
        what, arrays = "queue copies", (self._targets, self._sources, self._sizes)
        failed = c_size_t()
        with _on(device):
            _call(what, _BATCH, *arrays, self._count, self._attributes, self._first, 1, byref(failed), stream)


@cache
def has_batches() -> bool:
    """Whether this driver knows `Batch` (CUDA 12.8 or newer)."""
    function = getattr(_library(), _BATCH, None)
    if function is None:
        return False
    function.argtypes, function.restype = _BATCH_SIGNATURE, c_int
    return True
