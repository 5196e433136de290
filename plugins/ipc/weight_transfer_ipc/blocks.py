"""Shards that go through the ring of buckets: cut into boxes that fit a bucket each, of which workers take pieces.

Both sides derive the same blocks from the rank's shards, which of them are staged, and the bucket size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.authoring import ALIGNMENT, BucketPlan, ParamMeta, Pieces, Region, Slot, torch_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from weight_transfer.authoring import Manifest


@attrs.frozen(eq=False)
class Blocks:
    """The blocks of some shards, in the order in which they travel.

    Attributes:
        plan: the buckets; each block is a parameter of it, and lies in one bucket.
        shards: the number of the shard of each block.
        regions: where it lies in its shard.
        buckets: the number of its bucket.
    """

    plan: BucketPlan
    shards: tuple[int, ...]
    regions: tuple[Region, ...]
    buckets: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, staged: Sequence[int], bucket_bytes: int) -> Blocks:
        """Cut the shards ``staged`` of ``manifest``, contiguous as they will be, along the buckets' ends."""
        params: list[ParamMeta] = []
        shards, regions, numbers = [], [], []
        buckets: list[list[Slot]] = []
        offset = bucket_bytes
        for shard in staged:
            meta = manifest.params[shard]
            itemsize = torch_dtype(meta.dtype).itemsize
            cutter = _Cutter(meta.shape)
            while not cutter.done:
                offset = -(-offset // ALIGNMENT) * ALIGNMENT
                region = cutter.next(max(bucket_bytes - offset, 0) // itemsize, bucket_bytes // itemsize)
                if region is None:
                    buckets.append([])
                    offset = 0
                    continue
                param = ParamMeta(str(len(params)), meta.dtype, region.shape)
                buckets[-1].append(Slot(len(params), 0, offset, param.nbytes, last=True))
                offset += param.nbytes
                params.append(param)
                shards.append(shard)
                regions.append(region)
                numbers.append(len(buckets) - 1)
        plan = BucketPlan(tuple(params), bucket_bytes, tuple(map(tuple, buckets)))
        return cls(plan, tuple(shards), tuple(regions), tuple(numbers))

    def of_shards(self, tensors: Sequence[Tensor], staged: Sequence[int]) -> Iterator[Tensor]:
        """Yield the blocks of tensors: those of ``staged``, in its order."""
        by_number = dict(zip(staged, tensors, strict=True))
        for shard, region in zip(self.shards, self.regions, strict=True):
            yield by_number[shard].detach()[region.slices]

    def cut(self, pieces: Pieces) -> Pieces:
        """Cut pieces of staged shards along the blocks, which then stand for the shards; in the order of the blocks."""
        dims = pieces.shape.shape[1]
        order = np.argsort(pieces.shard, kind="stable")
        shards = np.array(self.shards, dtype=np.int64)
        first = np.searchsorted(pieces.shard[order], shards, side="left")
        count = np.searchsorted(pieces.shard[order], shards, side="right") - first
        block = np.repeat(np.arange(len(shards)), count)
        piece = order[np.repeat(first, count) + np.arange(len(block)) - np.repeat(count.cumsum() - count, count)]
        start = _filled([region.offset for region in self.regions], dims, 0)[block]
        end = start + _filled([region.shape for region in self.regions], dims, 1)[block]
        own = pieces.where(piece)
        low = np.maximum(own.source_start, start)
        high = np.minimum(own.source_start + own.shape, end)
        met = np.flatnonzero((low < high).all(axis=1))
        target_start = own.target_start + low - own.source_start
        cut = attrs.evolve(own, shard=block, source_start=low - start, target_start=target_start, shape=high - low)
        return cut.where(met)


class _Cutter:
    """Takes one box after another from a contiguous tensor, each of which is contiguous, too."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape) or (1,)
        self._scalar = not shape
        self._inner = [math.prod(self._shape[dim + 1 :]) for dim in range(len(self._shape))]
        self._position = 0
        self._total = math.prod(self._shape)

    @property
    def done(self) -> bool:
        return self._position >= self._total

    def next(self, room: int, most: int) -> Region | None:
        """Return the next box, of at most ``room`` elements; None if a new bucket, of ``most``, is to be begun."""
        index, rest = [], self._position
        for inner in self._inner:
            index.append(rest // inner)
            rest %= inner
        for dim, inner in enumerate(self._inner):
            if self._position % inner or inner > most:
                continue
            count = min(self._shape[dim] - index[dim], room // inner)
            if not count:
                return None
            self._position += count * inner
            if self._scalar:
                return Region((), ())
            return Region(index, (*[1] * dim, count, *self._shape[dim + 1 :]))
        raise ValueError("a bucket is smaller than an element")


def _filled(rows: Sequence[Sequence[int]], dims: int, fill: int) -> NDArray[np.int64]:
    table = np.full((len(rows), dims), fill, dtype=np.int64)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
