"""How the digest of a tensor is joined from those of its chunks; the same on a CPU and on a GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 128 * 2**10
"""Bytes that have a digest of their own; of more than 64 KiB, xxhash lets other threads run meanwhile."""
SCHEME = f"xxh3-64/{CHUNK}"
"""How digests are made; two sides that name it alike can compare theirs."""
Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shift and factor of each round of splitmix64's finaliser, a bijection; `LAST_SHIFT` ends it."""
LAST_SHIFT = 31


def chunks_of(nbytes: Words) -> NDArray[np.int64]:
    """Return how many chunks tensors of these sizes have, int64 ``[tensors]``; at least one each."""
    counts: NDArray[np.int64] = np.maximum(-(-nbytes.astype(np.int64) // CHUNK), 1)
    return counts


def keys_of(nbytes: Words) -> Words:
    """Return what stands for the place of each chunk in its tensor, tensor after tensor, uint64 ``[chunks]``."""
    counts = chunks_of(nbytes)
    place = np.arange(1, counts.sum() + 1) - np.repeat(counts.cumsum() - counts, counts)
    return place.astype(np.uint64) * np.uint64(GOLDEN)


def mixed(words: Words) -> Words:
    """Apply the finaliser to each word."""
    for shift, factor in ROUNDS:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(LAST_SHIFT))


def joined(chunks: Words, nbytes: Words) -> Words:
    """Return the digests of tensors, uint64 ``[tensors]``, from those of their chunks, tensor after tensor."""
    counts = chunks_of(nbytes)
    return finished(np.add.reduceat(mixed(chunks ^ keys_of(nbytes)), counts.cumsum() - counts), nbytes)


def finished(sums: Words, nbytes: Words) -> Words:
    """Return the digests of tensors from the sum of ``mixed(chunk ^ key)`` over the chunks of each.

    A chunk whose digest changes alone changes the sum for sure.
    """
    return mixed(sums ^ (nbytes * np.uint64(GOLDEN)))
