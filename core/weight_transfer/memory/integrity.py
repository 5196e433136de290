"""Digests of tensors, computed where they lie, at about the speed of their memory.

A tensor's bytes, in row-major order, are cut into chunks of 64 KiB, and each has its XXH3 (64 bits): from the library
``xxhash`` in host memory, from a kernel on a GPU, where all chunks of many tensors are one launch. The digest of a
tensor joins those of its chunks, with their places and the tensor's size. Swapped, shifted, torn or flipped bytes
change it all but certainly. It finds faults, not forgeries: it is no cryptographic hash.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from weight_transfer.copying.gpu import has_kernel
from weight_transfer.plan.buckets import as_bytes, laid_out

if TYPE_CHECKING:
    import torch

    from weight_transfer.memory.gpu_digests import GpuDigests

CHUNK = 64 * 2**10
"""Bytes that have a digest of their own."""
Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes as 16 hexadecimal digits.

    Neither shape nor dtype goes into it: the manifest compares those. See `tensor_digests`, which is faster for many.
    """
    return tensor_digests([tensor])[0]


def tensor_digests(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the digest of each tensor. Those on GPUs take one launch for each GPU.

    Temporary memory is 8 bytes per chunk, and the size of a tensor that is not contiguous.
    """
    digests = np.zeros(len(tensors), dtype=np.uint64)
    for numbers, found in [_group(numbers, tensors) for numbers in _by_memory(tensors)]:  # all GPUs work meanwhile
        digests[numbers] = _joined(found.chunks(), found.nbytes)
    return [f"{digest:016x}" for digest in digests.tolist()]


class HostDigests:
    """Digests of chunks, computed on the CPU.

    Args:
        tensors: those on other devices are copied.

    Attributes:
        nbytes: of each tensor, uint64 ``[tensors]``.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._kept = [as_bytes(laid_out(tensor.detach().cpu())) for tensor in tensors]
        self.nbytes: Words = np.array([data.numel() for data in self._kept], dtype=np.uint64)

    def chunks(self) -> Words:
        """Return the digests of all chunks, tensor after tensor, uint64."""
        found = (
            xxhash.xxh3_64_intdigest(data[start : start + CHUNK])
            for data in map(_memory, self._kept)
            for start in range(0, max(len(data), 1), CHUNK)
        )
        return np.fromiter(found, dtype=np.uint64)


def chunks_of(nbytes: Words) -> NDArray[np.int64]:
    """Return how many chunks tensors of these sizes have, int64 ``[tensors]``; at least one each."""
    counts: NDArray[np.int64] = np.maximum(-(-nbytes.astype(np.int64) // CHUNK), 1)
    return counts


def _memory(data: torch.Tensor) -> memoryview:
    """Return bytes in host memory by their address: ``numpy()`` would have the storage never be resized again."""
    if not data.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * data.numel()).from_address(data.data_ptr())).cast("B")


def _by_memory(tensors: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Return the numbers of those whose digests are computed together."""
    groups: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        groups.setdefault(tensor.device if tensor.is_cuda and has_kernel() else None, []).append(number)
    return groups.values()


def _group(numbers: list[int], tensors: Sequence[torch.Tensor]) -> tuple[list[int], HostDigests | GpuDigests]:
    own = [tensors[number] for number in numbers]
    if own[0].is_cuda and has_kernel():
        from weight_transfer.memory.gpu_digests import GpuDigests

        return numbers, GpuDigests(own)
    return numbers, HostDigests(own)


def _joined(chunks: Words, nbytes: Words) -> Words:
    """Join the digests of chunks, tensor after tensor: ``sum(mix(chunk ^ c[place]))``, and the size mixed in.

    ``mix`` is the finaliser of splitmix64, a bijection: a chunk whose digest changes alone changes the sum for sure.
    """
    counts = chunks_of(nbytes)
    first = counts.cumsum() - counts
    place = (np.arange(len(chunks)) - np.repeat(first, counts)).astype(np.uint64)
    sums = np.add.reduceat(_mixed(chunks ^ ((place + np.uint64(1)) * _GOLDEN)), first)
    return _mixed(sums ^ (nbytes * _GOLDEN))


def _mixed(words: Words) -> Words:
    for shift, factor in _ROUNDS:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> _LAST_SHIFT)
