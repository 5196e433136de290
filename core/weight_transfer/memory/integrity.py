"""Digests of tensors, computed where they lie, at about the speed of their memory.

A tensor's bytes, in row-major order, are cut into chunks of 128 KiB, and each has its XXH3 (64 bits): from the library
``xxhash`` in host memory, from a kernel on a GPU, where all chunks of many tensors are one launch. The digest of a
tensor joins those of its chunks, with their places and the tensor's size. Swapped, shifted, torn or flipped bytes
change it all but certainly. It finds faults, not forgeries: it is no cryptographic hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from weight_transfer.copying.gpu import has_kernel
from weight_transfer.copying.host import HostCopies
from weight_transfer.memory.gpu_digests import GpuReading
from weight_transfer.memory.host_digests import HostDigests, HostReading
from weight_transfer.memory.plain import lies_plain, plain
from weight_transfer.model.whereabouts import addresses_of

if TYPE_CHECKING:
    from weight_transfer.memory.chunks import Words
    from weight_transfer.memory.gpu_copies import WeightCopies
    from weight_transfer.memory.gpu_digests import Geometry, GpuDigests

_GATHERED = 2 * 2**30  # bytes of tensors that are read together
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
        self._gathered: dict[torch.device, _Gathered] = {}
        self._beside: set[torch.device] = set()

    def add(
        self,
        numbers: Sequence[int],
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        """Take some tensors.

        Those in host memory are read now. Those on a GPU are read in its current stream, and may be written in that
        stream as soon as this returns.

        Args:
            numbers: of each, below ``count``.
            tensors: with any strides.
            dtypes: in which the bytes of each count, with the bits of ``tensor.to``; by default its own.
        """
        wanted = [tensor.dtype for tensor in tensors] if dtypes is None else list(dtypes)
        for group in _groups(tensors, wanted):
            some = [(tensors[at], wanted[at]) for at in group]
            if some[0][0].is_cuda and has_kernel():
                with torch.cuda.device(some[0][0].device):
                    reading = GpuReading([_readable(*each) for each in some], self._geometry)
                    self._queued.append(([numbers[at] for at in group], reading.start()))
            else:
                self.put([numbers[at] for at in group], HostReading(some).digests())

    def add_reading(self, numbers: Sequence[int], reading: GpuReading) -> None:
        """Take tensors on a GPU, in its current stream."""
        self._queued.append((numbers, reading.start()))

    def add_beside(self, numbers: Sequence[int], reading: GpuReading) -> None:
        """Take tensors on a GPU after what its current stream holds now, but beside what comes next there.

        They may be written once `digests` has returned, or after `hold_up`.
        """
        with self._own_stream(reading.device):
            self.add_reading(numbers, reading)

    def gather(self, numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Take some tensors that nobody writes before `digests` has returned.

        Those in host memory are read now. Those on GPUs, which have their bytes once their current streams have come
        this far, are read some GB at a time, beside what comes next: many small launches would cost the host more.
        """
        on_host: list[int] = []
        for at, tensor in enumerate(tensors):
            if tensor.is_cuda and has_kernel():
                self._gathered.setdefault(tensor.device, _Gathered()).append(numbers[at], tensor)
            else:
                on_host.append(at)
        self.add([numbers[at] for at in on_host], [tensors[at] for at in on_host])
        for device, gathered in self._gathered.items():
            with self._own_stream(device):
                if gathered.nbytes >= _GATHERED:
                    self._read(gathered)

    def put(self, numbers: Sequence[int], digests: Words) -> None:
        """Take digests that are known."""
        self._digests[numbers] = digests

    def hold_up(self) -> None:
        """Have what the current streams of GPUs are given next wait for `add_beside`."""
        for device in self._beside:
            torch.cuda.current_stream(device).wait_stream(_stream_beside(device))

    def copy(self, numbers: Sequence[int], copies: HostCopies | WeightCopies) -> None:
        """Run copies, and take what each moves: in host memory what it has written, while a processor's cache has it.

        Args:
            numbers: of each target, below ``count``.
            copies: to be run.
        """
        if isinstance(copies, HostCopies):
            digests = HostDigests(copies.nbytes)
            copies.run_noting(digests)
            self.put(numbers, digests.digests())
            others = copies.converted
        else:
            noted, found = copies.run_noting()
            self._queued.append(([numbers[at] for at in noted], found))
            others = copies.others
        self.add([numbers[at] for at in others], list(others.values()))

    def digests(self) -> Words:
        """Return them by number, uint64 ``[count]``; waits for GPUs. Those that were never added are 0."""
        for device, gathered in self._gathered.items():
            with torch.cuda.stream(_stream_beside(device)):
                self._read(gathered)
        for numbers, found in self._queued:
            self._digests[numbers] = found.digests()
        self._queued.clear()
        return self._digests

    def _read(self, gathered: _Gathered) -> None:
        self.add(gathered.numbers, gathered.tensors)
        gathered.clear()

    def _own_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context whose current stream is our own, ordered after the one that is current now."""
        stream = _stream_beside(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._beside.add(device)
        return torch.cuda.stream(stream)


@attrs.define
class _Gathered:
    """Tensors on one GPU that are to be read together."""

    numbers: list[int] = attrs.field(factory=list)
    tensors: list[torch.Tensor] = attrs.field(factory=list)
    nbytes: int = 0

    def append(self, number: int, tensor: torch.Tensor) -> None:
        self.numbers.append(number)
        self.tensors.append(tensor)
        self.nbytes += tensor.nbytes

    def clear(self) -> None:
        self.numbers, self.tensors, self.nbytes = [], [], 0


class Reading:
    """The digests of some tensors, which are taken again and again as long as their shapes and strides stay.

    Args:
        tensors: on any devices.
        dtypes: in which the bytes of each count; by default its own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None = None) -> None:
        self._tensors = list(tensors)
        self._dtypes = [tensor.dtype for tensor in tensors] if dtypes is None else list(dtypes)
        is_on_gpus = any(tensor.is_cuda for tensor in tensors)
        self._on_host = None if is_on_gpus else HostReading(list(zip(tensors, self._dtypes, strict=True)))
        self._addresses: list[int] = []
        self._on_gpus: OnGpus = [], []

    def digests(self) -> Words:
        """Return them, uint64 ``[tensors]``."""
        if self._on_host is not None:
            return self._on_host.digests()
        addresses = addresses_of(self._tensors)
        if addresses != self._addresses:
            pairs = zip(self._tensors, self._dtypes, strict=True)
            self._addresses, self._on_gpus = addresses, read_on_gpus(dict(enumerate(pairs)))
        readings, others = self._on_gpus
        digester = Digester(len(self._tensors))
        for numbers, reading in readings:
            digester.add_reading(numbers, reading)
        left = [self._tensors[number] for number in others], [self._dtypes[number] for number in others]
        digester.add(others, *left)
        return digester.digests()


OnGpus = tuple[list[tuple[list[int], GpuReading]], list[int]]
"""What reads tensors on GPUs where they lie, with their numbers, and the numbers of all others."""


def read_on_gpus(tensors: Mapping[int, tuple[torch.Tensor, torch.dtype]]) -> OnGpus:
    """Return what reads those that a kernel can read where they lie.

    Args:
        tensors: by number, with the dtype in which the bytes of each count.
    """
    placed: dict[torch.device, dict[int, torch.Tensor]] = {}
    others = []
    for number, (tensor, dtype) in tensors.items():
        if tensor.is_cuda and has_kernel() and lies_plain(tensor, dtype):
            placed.setdefault(tensor.device, {})[number] = tensor
        else:
            others.append(number)
    return [(list(some), GpuReading(list(some.values()))) for some in placed.values()], others


def _readable(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a GPU, or a copy of its bytes that a kernel can read."""
    if lies_plain(tensor, dtype):
        return tensor
    data = plain(tensor, dtype)
    return data.clone() if data.data_ptr() % 8 else data


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which a GPU digests beside other work: one for all, as each takes memory of its own."""
    return torch.cuda.Stream(device)


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
