"""The digests of chunks of tensors on a GPU: one launch, and what is too short for it on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from weight_transfer.memory.integrity import CHUNK, chunks_of
from weight_transfer.plan.buckets import as_bytes, laid_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from weight_transfer.memory.integrity import Words

_SHORT = 240  # bytes up to which XXH3 is another algorithm
_HEIGHT = 16  # blocks of a program; twice as fast on an H100 as 32
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


class GpuDigests:
    """Digests of chunks that a GPU computes; queued on the current stream of the device when this is made.

    Args:
        tensors: all on one GPU; they must keep their bytes until that stream has come this far.

    Attributes:
        nbytes: of each tensor, uint64 ``[tensors]``.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._kept = [_aligned(as_bytes(laid_out(tensor.detach()))) for tensor in tensors]
        self.nbytes: Words = np.array([data.numel() for data in self._kept], dtype=np.uint64)
        table = _table([data.data_ptr() for data in self._kept], self.nbytes)
        self._sizes = table[:, 1]
        self._long = np.flatnonzero(self._sizes > _SHORT)
        self._short = np.flatnonzero(self._sizes <= _SHORT)
        owners = np.repeat(np.arange(len(tensors)), chunks_of(self.nbytes))[self._short].tolist()
        tails = [
            self._kept[owner][-size:]
            for owner, size in zip(owners, self._sizes[self._short].tolist(), strict=True)
            if size
        ]
        with torch.cuda.device(tensors[0].device):
            self._tails = torch.cat(tails) if tails else None
            self._found = _launched(table[self._long], tensors[0].device) if len(self._long) else None

    def chunks(self) -> Words:
        """Return the digests of all chunks, tensor after tensor, uint64; waits for the GPU."""
        digests = np.zeros(len(self._sizes), dtype=np.uint64)
        if self._found is not None:
            digests[self._long] = self._found.cpu().numpy().view(np.uint64)
        data = self._tails.cpu().numpy().data if self._tails is not None else memoryview(b"")
        end = 0
        for place, size in zip(self._short.tolist(), self._sizes[self._short].tolist(), strict=True):
            digests[place] = xxhash.xxh3_64_intdigest(data[end : end + size])
            end += size
        return digests


def _aligned(data: torch.Tensor) -> torch.Tensor:
    return data.clone() if data.data_ptr() % 8 else data


def _table(addresses: Sequence[int], nbytes: Words) -> NDArray[np.int64]:
    """Return address and bytes of each chunk, int64 ``[chunks, 2]``."""
    counts = chunks_of(nbytes)
    which = np.repeat(np.arange(len(counts)), counts)
    start = (np.arange(len(which)) - (counts.cumsum() - counts)[which]) * CHUNK
    size = np.minimum(nbytes.astype(np.int64)[which] - start, CHUNK)
    return np.stack((np.array(addresses, dtype=np.int64)[which] + start, size), axis=1)


def _launched(table: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    from weight_transfer.memory.digest_kernel import xxh3_blocks

    rows = len(table)
    on_device = torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    secret, start = _constants(device)
    xxh3_blocks[(-(-rows // _HEIGHT),)](on_device, secret, start, out, rows, _HEIGHT, num_warps=8)
    return out


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    secret = np.array([int.from_bytes(_SECRET[at : at + 8], "little") for at in range(185)], dtype=np.uint64)
    start = np.array(_START, dtype=np.uint64)
    return torch.from_numpy(secret.view(np.int64)).to(device), torch.from_numpy(start.view(np.int64)).to(device)
