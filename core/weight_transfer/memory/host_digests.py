"""Digests of bytes in host memory, taken piece by piece, by several threads, or right after the bytes were copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from weight_transfer.copying.host import BLOCK, LARGE, memory_at
from weight_transfer.copying.threads import share_out
from weight_transfer.memory.chunks import CHUNK, Words, chunks_of, joined
from weight_transfer.memory.plain import lies_plain, plain
from weight_transfer.model.whereabouts import addresses_of

if TYPE_CHECKING:
    import torch

assert BLOCK % CHUNK == 0 and LARGE <= CHUNK
_EMPTY = xxhash.xxh3_64_intdigest(b"")
_SOME = 4096  # small tensors between two looks at whether to go on


class HostDigests:
    """The digests of some tensors, which are told of piece by piece, in any order, by any thread.

    Args:
        nbytes: of each tensor.
    """

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._nbytes: Words = np.array(nbytes, dtype=np.uint64)
        counts = chunks_of(self._nbytes)
        self._first = counts.cumsum() - counts
        self._chunks: Words = np.full(int(counts.sum()), _EMPTY, dtype=np.uint64)

    def take(self, number: int, start: int, memory: memoryview) -> None:
        """Take some bytes of a tensor.

        Args:
            number: of the tensor.
            start: the first byte, a multiple of `CHUNK`.
            memory: a multiple of that, too, or up to the tensor's end.
        """
        starts = range(0, len(memory), CHUNK)
        first = int(self._first[number]) + start // CHUNK
        self._chunks[first : first + len(starts)] = [xxhash.xxh3_64_intdigest(memory[at : at + CHUNK]) for at in starts]

    def take_each(self, numbers: Sequence[int], memories: Sequence[memoryview]) -> None:
        """Take some whole tensors of at most `CHUNK` bytes, by number, and the bytes of each."""
        digests = map(xxhash.xxh3_64_intdigest, memories)
        self._chunks[self._first[numbers]] = np.fromiter(digests, np.uint64, len(memories))

    def take_all(self, number: int, data: torch.Tensor) -> None:
        """Take a whole tensor; ``data`` are its bytes, uint8."""
        blocks = range(0, data.nbytes, BLOCK)
        share_out(
            blocks, lambda at: self.take(number, at, memory_at(data.data_ptr() + at, min(BLOCK, data.nbytes - at)))
        )

    def digests(self) -> Words:
        """Return them, uint64 ``[tensors]``, once all bytes were taken."""
        return joined(self._chunks, self._nbytes)


class HostReading:
    """The digests of some tensors in host memory, which are taken again as long as their shapes and strides stay.

    Args:
        tensors: and the dtype in which the bytes of each count.
    """

    def __init__(self, tensors: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
        self._tensors = tensors
        self._nbytes = sizes = [tensor.numel() * dtype.itemsize for tensor, dtype in tensors]
        in_place = [not each[0].is_cuda and lies_plain(*each) for each in tensors]
        self._placed = list(compress(range(len(tensors)), in_place))
        self._others = [number for number, is_in_place in enumerate(in_place) if not is_in_place]
        self._small = [number for number in self._placed if sizes[number] <= CHUNK]
        large = (number for number in self._placed if sizes[number] > CHUNK)
        self._blocks = [(number, start) for number in large for start in range(0, sizes[number], BLOCK)]
        self._placed_tensors = [tensors[number][0] for number in self._placed]
        self._addresses: list[int] = []
        self._address_of: dict[int, int] = {}
        self._memories: list[memoryview] = []

    def digests(self, go_on: Callable[[], object] = tuple) -> Words:
        """Return them, uint64 ``[tensors]``; ``go_on`` is called again and again, on any thread, and may raise."""
        self._look()
        found = HostDigests(self._nbytes)
        for start in range(0, len(self._small), _SOME):
            go_on()
            some = slice(start, start + _SOME)
            found.take_each(self._small[some], self._memories[some])

        def take(block: tuple[int, int]) -> None:
            go_on()
            number, start = block
            nbytes = min(BLOCK, self._nbytes[number] - start)
            found.take(number, start, memory_at(self._address_of[number] + start, nbytes))

        share_out(self._blocks, take)
        for number in self._others:
            go_on()
            tensor, dtype = self._tensors[number]
            found.take_all(number, plain(tensor.detach().cpu(), dtype))
        return found.digests()

    def _look(self) -> None:
        """See where the tensors lie now."""
        addresses = addresses_of(self._placed_tensors)
        if addresses != self._addresses:
            self._addresses, self._address_of = addresses, dict(zip(self._placed, addresses, strict=True))
            self._memories = [memory_at(self._address_of[number], self._nbytes[number]) for number in self._small]
