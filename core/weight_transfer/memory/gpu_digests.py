"""The digests of tensors on a GPU: one launch for their chunks, and what is too short for it on the host.

The same launch may copy the tensors: it has their bytes in hand, and so the digests of a copy cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import attrs
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from weight_transfer.memory.chunks import CHUNK, LAST_SHIFT, ROUNDS, Words, chunks_of, finished, keys_of, mixed
from weight_transfer.plan.buckets import as_bytes

SHORT = 240
"""Bytes up to which XXH3 is another algorithm, which the kernel does not know."""
_KEPT = 4 * 2**20  # chunks whose places are kept: those of 256 GiB, 24 bytes each
_HEIGHT = 4  # blocks that a program has under way at once
_WARPS = 2  # of a program; with four it takes a third longer
_PROGRAMS = 8  # for each multiprocessor: as fast as more, and leaves room for others' kernels
_START = (
    0xC2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    0x9E3779B1,
)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


@attrs.frozen(eq=False)
class Chunks:
    """Where the chunks of some tensors lie, ready for the kernel.

    Attributes:
        table: of each chunk that is long enough for the kernel the address, bytes and where it is copied to, or 0,
            int64 ``[long, 3]``, on the GPU.
        keys: their keys, int64 ``[long]``, on the GPU.
        bounds: the number of the first one of each tensor, and of all, int64 ``[tensors + 1]``, on the GPU.
        tails: number and bytes of each tensor whose last chunk is too short for it, int64 ``[short, 2]``.
        tail_keys: the keys of those chunks, uint64 ``[short]``.
        there: the moment from which on the GPU has them.
    """

    table: torch.Tensor
    keys: torch.Tensor
    bounds: torch.Tensor
    tails: NDArray[np.int64]
    tail_keys: Words
    there: torch.cuda.Event

    @property
    def table_bytes(self) -> int:
        """Device memory that they take."""
        return self.table.nbytes + self.keys.nbytes + self.bounds.nbytes

    @classmethod
    def of(
        cls,
        addresses: NDArray[np.int64],
        nbytes: Words,
        device: torch.device,
        targets: NDArray[np.int64] | None = None,
    ) -> Chunks:
        """Cut tensors into chunks; the current stream brings them to the GPU.

        Args:
            addresses: of the tensors, all readable on one GPU, int64 ``[tensors]``.
            nbytes: of each, uint64 ``[tensors]``.
            device: the GPU.
            targets: addresses of copies, int64 ``[tensors]``; None if there are to be none.
        """
        counts = chunks_of(nbytes)
        owner = np.repeat(np.arange(len(counts)), counts)
        start = (np.arange(len(owner)) - (counts.cumsum() - counts)[owner]) * CHUNK
        size = np.minimum(nbytes.astype(np.int64)[owner] - start, CHUNK)
        keys = keys_of(nbytes)
        short = size <= SHORT
        to = targets[owner] + start if targets is not None else np.zeros_like(start)
        table = np.stack((addresses[owner] + start, size, to), axis=1)[~short]
        bounds = np.searchsorted(owner[~short], np.arange(len(counts) + 1))
        columns = table, keys[~short].view(np.int64), bounds
        on_gpu = [torch.from_numpy(column).pin_memory().to(device, non_blocking=True) for column in columns]
        there = torch.cuda.current_stream(device).record_event()
        tails = np.stack((owner, size), axis=1)[short]
        return cls(on_gpu[0], on_gpu[1], on_gpu[2], tails, keys[short], there)


class Geometry:
    """Keeps the chunks of tensors that are asked for again and again, as long as they lie where they lay."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, bytes, bytes], Chunks] = {}  # the latest last
        self._count = 0

    def chunks(self, addresses: NDArray[np.int64], nbytes: Words, device: torch.device) -> Chunks:
        """Return what `Chunks.of` does."""
        key = device, addresses.tobytes(), nbytes.tobytes()
        chunks = self._kept.pop(key, None)
        if chunks is None:
            chunks = Chunks.of(addresses, nbytes, device)
            self._count += len(chunks.keys)
        self._kept[key] = chunks
        while self._count > _KEPT:
            self._count -= len(self._kept.pop(next(iter(self._kept))).keys)
        return chunks


class GpuReading:
    """Tensors of one GPU, which are digested where they lie, again and again as long as they lie there.

    Args:
        tensors: with bytes in row-major order at a multiple of 8 (`lies_plain`); they are kept.
        geometry: see `Geometry`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], geometry: Geometry | None = None) -> None:
        self.device = tensors[0].device
        self._tensors = tensors
        self._nbytes: Words = np.array([tensor.nbytes for tensor in tensors], dtype=np.uint64)
        addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        with torch.cuda.device(self.device):
            self._chunks = (geometry or Geometry()).chunks(addresses, self._nbytes, self.device)
        ends = [(tensors[number].detach(), size) for number, size in self._chunks.tails.tolist() if size]
        self._tails = [as_bytes(tensor)[-size:] for tensor, size in ends]

    def start(self) -> GpuDigests:
        """Queue it on the current stream of the device. The tensors must keep their bytes until that has come here."""
        with torch.cuda.device(self.device):
            return GpuDigests(self._chunks, self._nbytes, self._tails)


class GpuDigests:
    """Digests that a GPU computes; queued on the current stream, of the current device, when this is made.

    Args:
        chunks: of the tensors.
        nbytes: of each tensor.
        tails: the bytes of what is too short for the kernel, uint8, on the GPU.
        copies: whether the chunks are also copied to where their table says.
    """

    def __init__(
        self, chunks: Chunks, nbytes: Words, tails: Sequence[torch.Tensor] = (), *, copies: bool = False
    ) -> None:
        self._chunks, self._nbytes = chunks, nbytes
        stream = torch.cuda.current_stream()
        stream.wait_event(chunks.there)  # another one may have brought them
        for kept in (chunks.table, chunks.keys, chunks.bounds):  # may be forgotten before this stream has used them
            kept.record_stream(stream)
        found = _launched(chunks.table, copies)
        self._tails = _to_host(torch.cat(list(tails))) if tails else None
        self._sums = _to_host(_sums(chunks, found))
        self._done = torch.cuda.Event()
        self._done.record()

    def digests(self) -> Words:
        """Return the digest of each tensor, uint64 ``[tensors]``; waits for the GPU."""
        self._done.synchronize()
        sums = self._sums.numpy().view(np.uint64).copy()
        data = self._tails.numpy().data if self._tails is not None else memoryview(b"")
        ends = self._chunks.tails[:, 1].cumsum().tolist()
        found = [
            xxhash.xxh3_64_intdigest(data[end - size : end])
            for end, size in zip(ends, self._chunks.tails[:, 1].tolist(), strict=True)
        ]
        sums[self._chunks.tails[:, 0]] += mixed(np.array(found, dtype=np.uint64) ^ self._chunks.tail_keys)
        return finished(sums, self._nbytes)


def _to_host(found: torch.Tensor) -> torch.Tensor:
    """Return a copy in pinned memory, which is there when the current stream has come this far."""
    return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)


def _sums(chunks: Chunks, found: torch.Tensor) -> torch.Tensor:
    """Return the sum over the chunks of each tensor, int64 ``[tensors]``, which wraps around as uint64 does."""
    words = found ^ chunks.keys
    for shift, factor in ROUNDS:
        words = (words ^ _shifted(words, shift)) * (factor - 2**64)
    words = words ^ _shifted(words, LAST_SHIFT)
    sums: torch.Tensor = torch.cat((words.new_zeros(1), words.cumsum(0)))[chunks.bounds].diff()
    return sums


def _shifted(words: torch.Tensor, shift: int) -> torch.Tensor:
    shifted: torch.Tensor = (words >> shift) & (2 ** (64 - shift) - 1)
    return shifted


def _launched(table: torch.Tensor, copies: bool) -> torch.Tensor:
    from weight_transfer.memory.digest_kernel import xxh3_blocks

    rows = len(table)
    out = torch.empty(rows, dtype=torch.int64, device=table.device)
    if rows:
        secret, start = _constants(table.device)
        programs = min(-(-rows // _HEIGHT), _programs(table.device))
        xxh3_blocks[(programs,)](table, secret, start, out, rows, _HEIGHT, copies, num_warps=_WARPS)
    return out


@cache
def _programs(device: torch.device) -> int:
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    secret = np.array([int.from_bytes(_SECRET[at : at + 8], "little") for at in range(185)], dtype=np.uint64)
    start = np.array(_START, dtype=np.uint64)
    return torch.from_numpy(secret.view(np.int64)).to(device), torch.from_numpy(start.view(np.int64)).to(device)
