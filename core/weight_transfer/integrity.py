"""Position-sensitive digests of tensors, computed where the tensor lies (CPU or GPU), in bounded memory.

For 64-bit words x[i] of one block, with odd multipliers m[i] that differ by position, and wrapping arithmetic:

    y[i] = x[i] * m[i];  digest = digest * p + sum(mix(y[i]))

``mix`` is a bijection, so a change of any single word changes the digest for sure; swapped, shifted or torn words
change it all but certainly. It finds faults, not forgeries: it is no cryptographic hash.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from weight_transfer.buckets import as_bytes, laid_out

_BLOCK = 1 << 18  # words: 2 MiB, which stays in cache
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1


@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> torch.Tensor:
    return (torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=device) * _GOLDEN) | 1


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, in row-major order, as 16 hexadecimal digits.

    Neither shape nor dtype goes into it: the manifest compares those. Temporary memory is at most 8 MiB on the
    tensor's device, and the tensor's size if it is not contiguous.
    """
    data = as_bytes(laid_out(tensor))
    words, tail = data.numel() // 8, data.numel() % 8
    total = data.numel()
    if words:
        whole = data[: words * 8]
        if whole.data_ptr() % 8 or whole.storage_offset() % 8:
            whole = whole.clone()
        for block in whole.view(torch.int64).split(_BLOCK):
            total = (total * _PRIME + _mixed_sum(block)) & _MASK
    if tail:
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[:tail] = data[words * 8 :]
        total = (total * _PRIME + _mixed_sum(last.view(torch.int64))) & _MASK
    return f"{total:016x}"


def _mixed_sum(block: torch.Tensor) -> int:
    y = block * _multipliers(block.device)[: block.numel()]
    y ^= (y >> 32) & 0xFFFFFFFF  # a logical shift: the arithmetic one would not be a bijection
    y *= _GOLDEN
    return int(y.sum())
