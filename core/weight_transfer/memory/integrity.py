"""Position-sensitive digests of tensors, computed where the tensor lies (CPU or GPU), in bounded memory.

For 64-bit words x[i] of one block, with constants c[i] that differ by position, and wrapping arithmetic:

    digest = digest * p + sum(mix(x[i] ^ c[i]))

``mix`` is a bijection, so a change of any single word changes the digest for sure. It is the finaliser of splitmix64,
not a mere product: that leaves low bits as they are, and words that differ in their signs alone could be swapped
unnoticed. Swapped, shifted or torn words change the digest all but certainly. It finds faults, not forgeries: it is no
cryptographic hash.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from weight_transfer.plan.buckets import as_bytes, laid_out

_BLOCK = 1 << 18  # words: 2 MiB, which stays in cache
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31
_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> torch.Tensor:
    return torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=device) * _GOLDEN


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
    y = block ^ _constants(block.device)[: block.numel()]
    for shift, factor in _ROUNDS:
        _fold(y, shift)
        y *= factor
    _fold(y, _LAST_SHIFT)
    return int(y.sum())


def _fold(y: torch.Tensor, shift: int) -> None:
    """``y ^= y >> shift`` with a logical shift: the arithmetic one would not be a bijection."""
    high = y >> shift
    high &= _MASK >> shift
    y ^= high
