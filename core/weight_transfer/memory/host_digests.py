"""Digests of bytes in host memory, taken piece by piece, by several threads, or right after the bytes were copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        self._nbytes = nbytes
        self._words: Words = np.array(nbytes, dtype=np.uint64)
        counts = chunks_of(self._words)
        self._first = (counts.cumsum() - counts).tolist()
        self._chunks = [_EMPTY] * int(counts.sum())

    def take(self, number: int, start: int, memory: memoryview) -> None:
        """Take some bytes of a tensor.

        Args:
            number: of the tensor.
            start: the first byte, a multiple of `CHUNK`.
            memory: a multiple of that, too, or up to the tensor's end.
        """
        first = self._first[number] + start // CHUNK
        if len(memory) <= CHUNK:  # of thousands of small tensors the slices below would cost more than the bytes
            self._chunks[first] = xxhash.xxh3_64_intdigest(memory)
            return
        starts = range(0, len(memory), CHUNK)
        self._chunks[first : first + len(starts)] = [xxhash.xxh3_64_intdigest(memory[at : at + CHUNK]) for at in starts]

    def take_all(self, addresses: Mapping[int, int]) -> None:
        """Take whole tensors, whose bytes lie at these addresses, by number."""
        large: list[tuple[int, int]] = []
        for number, address in addresses.items():
            nbytes = self._nbytes[number]
            if nbytes <= CHUNK:
                self._chunks[self._first[number]] = xxhash.xxh3_64_intdigest(memory_at(address, nbytes))
            else:
                large += [(number, at) for at in range(0, nbytes, BLOCK)]

        def take(block: tuple[int, int]) -> None:
            number, at = block
            self.take(number, at, memory_at(addresses[number] + at, min(BLOCK, self._nbytes[number] - at)))

        share_out(large, take)

    def digests(self) -> Words:
        """Return them, uint64 ``[tensors]``, once all bytes were taken."""
        return joined(np.array(self._chunks, dtype=np.uint64), self._words)
