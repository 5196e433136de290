"""Boxes of a parameter: which part of it a trainer rank holds, or a worker keeps."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import attrs


def _sizes(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


@attrs.frozen
class Region:
    """A box of a parameter.

    Attributes:
        offset: its first element, one index per dimension of the parameter.
        shape: elements in each dimension; 0 in one of them makes it empty.

    Raises:
        ValueError: offset and shape differ in length, or one is negative.
        TypeError: one is not a whole number.
    """

    offset: tuple[int, ...] = attrs.field(converter=_sizes)
    shape: tuple[int, ...] = attrs.field(converter=_sizes)

    def __attrs_post_init__(self) -> None:
        if len(self.offset) != len(self.shape) or min((*self.offset, *self.shape), default=0) < 0:
            raise ValueError(
                "a region needs an offset and a size per dimension, of at least 0, "
                f"got {list(self.offset)} and {list(self.shape)}"
            )

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return all of a parameter of this full shape."""
        return cls((0,) * len(shape), shape)

    @classmethod
    def split(cls, shape: Sequence[int], dim: int, index: int, count: int) -> Region:
        """Return part ``index`` of ``count`` of a parameter that is cut along one dimension.

        Sizes are those of `torch.chunk` and of DTensor's ``Shard(dim)``: the last parts may be smaller, or empty.

        Args:
            shape: the full shape.
            dim: the dimension; negative ones count from the end.
            index: which part.
            count: how many parts.

        Raises:
            ValueError: there is no such dimension or part.
        """
        if not -len(shape) <= dim < len(shape) or not 0 <= index < count:
            raise ValueError(f"part {index} of {count} along dimension {dim} of {list(shape)} does not exist")
        dim %= len(shape)
        part = -(-shape[dim] // count)
        start = min(index * part, shape[dim])
        offset, own = [0] * len(shape), list(shape)
        offset[dim], own[dim] = start, min(part, shape[dim] - start)
        return cls(offset, own)

    @property
    def volume(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes it in a tensor of the parameter's full shape."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it lies in a parameter of this full shape."""
        ends = map(operator.add, self.offset, self.shape)
        return len(shape) == len(self.shape) and all(map(operator.le, ends, shape))

    def intersect(self, other: Region) -> Region | None:
        """Return what it has in common with another region of the same parameter; None if that is nothing."""
        spans = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(begin >= end for begin, end in spans):
            return None
        return Region((begin for begin, _ in spans), (end - begin for begin, end in spans))

    def __str__(self) -> str:
        ranges = (f"{start}:{start + size}" for start, size in zip(self.offset, self.shape, strict=True))
        return f"[{', '.join(ranges)}]"
