"""Digests of bytes in host memory, taken piece by piece, by several threads, or right after the bytes were copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from weight_transfer.copying.host import BLOCK, memory_at
from weight_transfer.copying.threads import share_out
from weight_transfer.memory.chunks import CHUNK, Words, chunks_of, joined

assert BLOCK % CHUNK == 0
_EMPTY = xxhash.xxh3_64_intdigest(b"")


class HostDigests:
    """The digests of some tensors, which are told of piece by piece, in any order, by any thread.

    Args:
        nbytes: of each tensor.
    """

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._nbytes: Words = np.array(nbytes, dtype=np.uint64)
        counts = chunks_of(self._nbytes)
        self._first = (counts.cumsum() - counts).tolist()
        self._chunks = [_EMPTY] * int(counts.sum())

    def take(self, number: int, start: int, memory: memoryview) -> None:
        """Take some bytes of a tensor.

        Args:
            number: of the tensor.
            start: the first byte, a multiple of `CHUNK`.
            memory: a multiple of that, too, or up to the tensor's end.
        """
        starts = range(0, len(memory), CHUNK)
        first = self._first[number] + start // CHUNK
        self._chunks[first : first + len(starts)] = [xxhash.xxh3_64_intdigest(memory[at : at + CHUNK]) for at in starts]

    def take_all(self, number: int, address: int) -> None:
        """Take a whole tensor, whose bytes lie at ``address``."""
        nbytes = int(self._nbytes[number])
        blocks = range(0, nbytes, BLOCK)
        share_out(blocks, lambda at: self.take(number, at, memory_at(address + at, min(BLOCK, nbytes - at))))

    def digests(self) -> Words:
        """Return them, uint64 ``[tensors]``, once all bytes were taken."""
        return joined(np.array(self._chunks, dtype=np.uint64), self._nbytes)
