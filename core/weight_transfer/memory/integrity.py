"""Digests of tensors, computed where they lie, at about the speed of their memory.

A tensor's bytes, in row-major order, are cut into chunks of 128 KiB, and each has its XXH3 (64 bits): from the library
``xxhash`` in host memory, from a kernel on a GPU, where all chunks of many tensors are one launch. The digest of a
tensor joins those of its chunks, with their places and the tensor's size. Swapped, shifted, torn or flipped bytes
change it all but certainly. It finds faults, not forgeries: it is no cryptographic hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from weight_transfer.copying.gpu import has_kernel
from weight_transfer.memory.host_digests import HostDigests, HostReading
from weight_transfer.memory.plain import lies_plain

if TYPE_CHECKING:
    from weight_transfer.copying.host import HostCopies
    from weight_transfer.memory.chunks import Words
    from weight_transfer.memory.gpu_digests import Geometry, GpuDigests

_TEMPORARY = 256 * 2**20  # bytes of tensors that have to be copied for one launch


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes as 16 hexadecimal digits.

    Neither shape nor dtype goes into it: the manifest compares those. See `tensor_digests`, which is faster for many.
    """
    return tensor_digests([tensor])[0]


def tensor_digests(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the digest of each tensor. Those on GPUs take one launch for each GPU.

    Temporary memory is 32 bytes per chunk on a GPU, and the size of a tensor that is not contiguous, on a GPU up to
    256 MiB of them.
    """
    digester = Digester(len(tensors))
    digester.add(range(len(tensors)), tensors)
    return [f"{digest:016x}" for digest in digester.digests().tolist()]


class Digester:
    """Digests of tensors that come one after another, or many at once, in any order.

    Args:
        count: how many there will be.
        geometry: keeps what was worked out of the places of tensors on GPUs, for those that are asked for again.
    """

    def __init__(self, count: int, geometry: Geometry | None = None) -> None:
        self._digests: Words = np.zeros(count, dtype=np.uint64)
        self._geometry = geometry
        self._queued: list[tuple[Sequence[int], GpuDigests]] = []
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def add(
        self,
        numbers: Sequence[int],
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """Take some tensors.

        Those in host memory are read now. Those on a GPU are read in its current stream, and may be written in that
        stream as soon as this returns.

        Args:
            numbers: of each, below ``count``.
            tensors: with any strides.
            dtypes: in which the bytes of each count, with the bits of ``tensor.to``; by default its own.
            beside: read those on a GPU after what its current stream holds now, but beside what comes next there.
                They may be written once `digests` has returned, or after `hold_up`.
        """
        wanted = [tensor.dtype for tensor in tensors] if dtypes is None else list(dtypes)
        for group in _groups(tensors, wanted):
            some = [(tensors[at], wanted[at]) for at in group]
            if some[0][0].is_cuda and has_kernel():
                from weight_transfer.memory.gpu_digests import GpuDigests

                with self._stream(some[0][0].device) if beside else nullcontext():
                    self._queued.append(([numbers[at] for at in group], GpuDigests(some, self._geometry)))
            else:
                self.put([numbers[at] for at in group], HostReading(some).digests())

    def put(self, numbers: Sequence[int], digests: Words) -> None:
        """Take digests that are known."""
        self._digests[numbers] = digests

    def hold_up(self) -> None:
        """Have what the current streams of GPUs are given next wait for what is read beside them."""
        for device, stream in self._beside.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def copy(self, numbers: Sequence[int], copies: HostCopies) -> None:
        """Run copies, and take what each has written while it is in the processor's cache.

        Args:
            numbers: of each target, below ``count``.
            copies: to be run.
        """
        digests = HostDigests(copies.nbytes)
        copies.run_noting(digests)
        self.put(numbers, digests.digests())
        self.add([numbers[at] for at in copies.converted], list(copies.converted.values()))

    def digests(self) -> Words:
        """Return them by number, uint64 ``[count]``; waits for GPUs. Those that were never added are 0."""
        for numbers, found in self._queued:
            self._digests[numbers] = found.digests()
        self._queued.clear()
        return self._digests

    def _stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context whose current stream is one of our own, ordered after the one that is current now."""
        stream = self._beside.get(device)
        if stream is None:
            stream = self._beside[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


class Reading:
    """The digests of some tensors, which are taken again and again as long as their shapes and strides stay.

    Args:
        tensors: on any devices.
        dtypes: in which the bytes of each count; by default its own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None = None) -> None:
        self._tensors = tensors
        self._dtypes = [tensor.dtype for tensor in tensors] if dtypes is None else dtypes
        is_on_gpus = any(tensor.is_cuda for tensor in tensors)
        self._on_host = None if is_on_gpus else HostReading(list(zip(tensors, self._dtypes, strict=True)))

    def digests(self, geometry: Geometry) -> Words:
        """Return them, uint64 ``[tensors]``; for ``geometry`` see `Digester`."""
        if self._on_host is not None:
            return self._on_host.digests()
        digester = Digester(len(self._tensors), geometry)
        digester.add(range(len(self._tensors)), self._tensors, self._dtypes)
        return digester.digests()


def _groups(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> Iterator[list[int]]:
    """Yield the numbers of those whose digests are computed together: of one device, and with bounded copies."""
    on_host = [number for number, tensor in enumerate(tensors) if not tensor.is_cuda]
    if on_host:
        yield on_host
    open_groups: dict[torch.device, tuple[list[int], int]] = {}
    for number, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if not tensor.is_cuda:
            continue
        device = tensor.device
        group, temporary = open_groups.get(device, ([], 0))
        if not lies_plain(tensor, dtype):
            copied = tensor.numel() * dtype.itemsize
            if group and temporary + copied > _TEMPORARY:
                yield group
                group, temporary = [], 0
            temporary += copied
        group.append(number)
        open_groups[device] = group, temporary
    yield from (group for group, _ in open_groups.values())
