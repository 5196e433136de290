"""Which pieces a trainer rank packs for a worker, and where in its buckets: derived alike on both sides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.authoring import ALIGNMENT, Layout, Pieces
from weight_transfer_rdma.plan import Integers

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOWHERE = -1
"""The address of a tensor that an agent cannot read from, or write to, as it is."""


def shard_shapes(layout: Layout, rank: int, dims: int) -> Integers:
    """Return the shape of each shard of a rank, int64 ``[shards, dims]``, filled up with 1."""
    tables = []
    for pattern in layout.patterns:
        own = pattern[pattern[:, 0] == rank]
        shapes = np.ones((len(own), dims), dtype=np.int64)
        width = (own.shape[1] - 1) // 2
        shapes[:, :width] = own[:, 1 + width :]
        tables.append(shapes)
    counts = np.array([*map(len, tables), 0], dtype=np.int64)[layout.pattern_of]  # the last: of weights that go whole
    first = np.cumsum([0, *map(len, tables)])[layout.pattern_of]
    rows = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
    found: Integers = np.concatenate([*tables, np.ones((0, dims), dtype=np.int64)])[rows]
    return found


def row_major(shapes: Integers) -> Integers:
    """Return the strides, in elements, of contiguous tensors; int64 ``[tensors, dims]``."""
    after = np.concatenate([shapes[:, 1:], np.ones((len(shapes), 1), dtype=np.int64)], axis=1)
    strides: Integers = after[:, ::-1].cumprod(axis=1)[:, ::-1]
    return strides


def run_bytes(pieces: Pieces, *shapes: Integers) -> Integers:
    """Return how many bytes of each piece lie in a row in each of some contiguous tensors, int64 ``[pieces]``.

    Args:
        pieces: the pieces.
        shapes: of the tensors, int64 ``[pieces, dims]`` each.
    """
    run, goes_on = pieces.itemsize.copy(), np.ones(len(pieces), dtype=np.bool_)
    for dim in range(pieces.shape.shape[1] - 1, -1, -1):
        run[goes_on] *= pieces.shape[goes_on, dim]
        for shape in shapes:
            goes_on &= pieces.shape[:, dim] == shape[:, dim]
    return run


@attrs.frozen(kw_only=True)
class Worth:
    """What is worth a read of its own, in bytes; what is cut finer, or is smaller, goes through buckets.

    Attributes:
        run: of each run of a piece.
        piece: of a piece that is a single run.
    """

    run: int
    piece: int

    def of(self, pieces: Pieces, *shapes: Integers) -> NDArray[np.bool_]:
        """Say which pieces are; for ``shapes`` see `run_bytes`."""
        run = run_bytes(pieces, *shapes)
        found: NDArray[np.bool_] = (run >= self.run) | ((run == pieces.sizes) & (run >= self.piece))
        return found


def can_be_read(pieces: Pieces, addresses: Integers, shapes: Integers, worth: Worth) -> NDArray[np.bool_]:
    """Say which pieces a worker reads where they lie; the others are packed.

    Args:
        pieces: of one rank.
        addresses: of its shards; `NOWHERE` for those that are packed.
        shapes: of its shards.
        worth: of the rank.
    """
    found: NDArray[np.bool_] = (addresses[pieces.shard] != NOWHERE) & worth.of(pieces, shapes[pieces.shard])
    return found


@attrs.frozen(eq=False)
class Packing:
    """Pieces one after another in buckets, cut where a bucket ends.

    Attributes:
        pieces: as they were cut, in order.
        bucket: int64 ``[pieces]``: number of the bucket.
        offset: int64 ``[pieces]``: first byte within it; a multiple of 256.
        buckets: how many there are.
    """

    pieces: Pieces
    bucket: Integers
    offset: Integers
    buckets: int

    def of_bucket(self, number: int) -> NDArray[np.intp]:
        """Return which pieces lie in a bucket."""
        first, last = np.searchsorted(self.bucket, [number, number + 1])
        return np.arange(first, last)

    def used(self, number: int) -> int:
        """Return the bytes of a bucket up to the end of its last piece."""
        last = int(np.searchsorted(self.bucket, number + 1)) - 1
        return int(self.offset[last] + self.pieces.sizes[last])


def pack(pieces: Pieces, bucket_bytes: int) -> Packing:
    """Lay pieces out in buckets of ``bucket_bytes``, a multiple of 256.

    Pieces are cut along their first dimension, and along the next one where a single row is larger than a bucket.
    """
    which: list[int] = []
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    buckets: list[int] = []
    offsets: list[int] = []
    number, offset = 0, 0
    for piece, (shape, itemsize) in enumerate(zip(pieces.shape.tolist(), pieces.itemsize.tolist(), strict=True)):
        open_boxes = [((0,) * len(shape), tuple(shape))]
        while open_boxes:
            start, size = open_boxes.pop()
            nbytes = math.prod(size) * itemsize
            if not nbytes:
                continue
            if nbytes > bucket_bytes - offset:
                dim, fits = _cut(size, itemsize, bucket_bytes - offset, bucket_bytes)
                if not fits:
                    number, offset = number + 1, 0
                    open_boxes.append((start, size))
                    continue
                open_boxes.append((_with(start, dim, start[dim] + fits), _with(size, dim, size[dim] - fits)))
                open_boxes.append((start, _with(size, dim, fits)))
                continue
            which.append(piece)
            boxes.append((start, size))
            buckets.append(number)
            offsets.append(offset)
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    own = pieces.where(np.array(which, dtype=np.int64))
    table = np.array(boxes, dtype=np.int64).reshape(len(boxes), 2, pieces.shape.shape[1])
    begin, extent = table[:, 0], table[:, 1]
    cut = attrs.evolve(own, source_start=own.source_start + begin, target_start=own.target_start + begin, shape=extent)
    columns = np.array(buckets, dtype=np.int64), np.array(offsets, dtype=np.int64)
    return Packing(cut, *columns, number + 1 if boxes else 0)


def _cut(size: tuple[int, ...], itemsize: int, left: int, bucket_bytes: int) -> tuple[int, int]:
    """Return along which dimension a box is to be cut, and how much of it goes into what is left of a bucket."""
    for dim in range(len(size)):
        row = math.prod(size[dim + 1 :]) * itemsize
        if size[dim] > 1 and row <= left:
            return dim, min(left // row, size[dim] - 1)
        if size[dim] > 1 and row <= bucket_bytes:
            return dim, 0
        if size[dim] > 1:
            return dim, 1  # each row is cut by itself
    return 0, 0


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
