"""Strided views as numbers: where the elements of a view lie in a tensor, and which boxes of it they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import attrs

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen
class Strided:
    """Elements of a tensor, at even steps through its memory.

    Attributes:
        offset: how far the first element lies behind the tensor's own first one, in elements.
        shape: elements in each dimension.
        stride: step from one to the next in each dimension, in elements, of at least 0.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, view: Tensor, origin: int = 0) -> Strided:
        """Describe a view, in a tensor that begins ``origin`` elements behind the start of the storage."""
        return cls(int(view.storage_offset()) - origin, tuple(view.shape), view.stride())

    @classmethod
    def contiguous(cls, shape: Sequence[int]) -> Strided:
        """Return all of a contiguous tensor of this shape."""
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= max(size, 1)
        return cls(0, tuple(shape), tuple(reversed(stride)))

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The offset behind its last element; its own offset if it has none."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_injective(self) -> bool:
        """Whether surely no two of its elements are one, as they are after ``expand``."""
        reach = 0
        for step, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if step <= reach:
                    return False
                reach += (size - 1) * step
        return True

    def on(self, tensor: Tensor) -> Tensor:
        """Return the elements as a view of ``tensor``, whose strides are those of the tensor that was described."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


def coalesce(first: Strided, *others: Strided) -> tuple[Strided, ...]:
    """Return the same elements in the same pairs, in as few dimensions as all views allow.

    Args:
        first: its strides fall from dimension to dimension in what is returned.
        others: of the same shape.
    """
    views = (first, *others)
    if 0 in first.shape:
        return tuple(Strided(view.offset, (0,), (1,)) for view in views)
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    rows = [row for row in zip(first.shape, *(view.stride for view in views), strict=True) if row[0] != 1]
    if len(rows) > 1:
        rows.sort(key=_strides, reverse=True)
    for size, *own in rows:
        if sizes and all(outer == step * size for outer, step in zip(steps[-1], own, strict=True)):
            sizes[-1] *= size
            steps[-1] = tuple(own)
        else:
            sizes.append(size)
            steps.append(tuple(own))
    shape = tuple(sizes)
    columns = zip(*steps, strict=True) if steps else ((),) * len(views)
    return tuple(Strided(view.offset, shape, stride) for view, stride in zip(views, columns, strict=True))


def _strides(row: tuple[int, ...]) -> tuple[int, ...]:
    return row[1:]


class Walk(NamedTuple):
    """Steps along one dimension of a tensor.

    Attributes:
        axis: the dimension.
        size: how many elements.
        step: from one index to the next.
        other: the stride, at the same time, of the view that goes along.
    """

    axis: int
    size: int
    step: int
    other: int


@attrs.frozen
class Walks:
    """A view of a tensor, as an index from which walks go along the tensor's dimensions.

    Attributes:
        start: one index per dimension of the tensor.
        walks: the longest stride first; several may go along one dimension.
    """

    start: tuple[int, ...]
    walks: tuple[Walk, ...]

    def per_axis(self) -> list[Walk] | None:
        """Return the one walk along each dimension; of one element if there is none; None if several do not join."""
        joined = [Walk(axis, 1, 1, 1) for axis in range(len(self.start))]
        for walk in sorted(self.walks, key=lambda walk: walk.step):
            inner = joined[walk.axis]
            if inner.size == 1:
                joined[walk.axis] = walk
            elif (walk.step, walk.other) == (inner.step * inner.size, inner.other * inner.size):
                joined[walk.axis] = inner._replace(size=inner.size * walk.size)
            else:
                return None
        return joined


def walks_of(view: Strided, tensor: Strided, other: Strided | None = None) -> Walks | None:
    """Return a view as walks along the dimensions of the tensor in which it lies.

    A dimension of the view that goes over several of the tensor is split, and that of the other view with it.

    Args:
        view: not empty.
        tensor: the whole tensor, none of whose dimensions lie within each other.
        other: a view of the same shape in another tensor.

    Returns:
        None if the view steps over the tensor's dimensions aslant, or the tensor is none of that kind.
    """
    axes = _axes(tensor)
    if axes is None:
        return None
    start, rest = [0] * len(tensor.shape), view.offset - tensor.offset
    for axis, size, step in axes:
        start[axis], rest = divmod(rest, step)
        if not 0 <= start[axis] < size:
            return None
    if rest:
        return None
    last = list(start)
    walks: list[Walk] = []
    along = other.stride if other is not None else (0,) * len(view.shape)
    rows = zip(view.shape, view.stride, along, strict=True)
    for count, stride, follow in sorted((row for row in rows if row[0] > 1), key=lambda row: row[1]):
        if not _walk(count, stride, follow, axes, last, walks):
            return None
    return Walks(tuple(start), tuple(reversed(walks)))


def _axes(tensor: Strided) -> list[tuple[int, int, int]] | None:
    """Return dimension, size and stride of each with several elements, the longest stride first; None if they mix."""
    rows = zip(range(len(tensor.shape)), tensor.shape, tensor.stride, strict=True)
    axes = sorted((row for row in rows if row[1] > 1), key=lambda row: -row[2])
    steps = [step for _, _, step in axes]
    nested = all(outer >= size * step for outer, (_, size, step) in zip(steps, axes[1:], strict=False))
    return axes if nested and 0 not in steps and 0 not in tensor.shape else None


def _walk(
    count: int, stride: int, follow: int, axes: list[tuple[int, int, int]], last: list[int], walks: list[Walk]
) -> bool:
    """Add the walks of one dimension of a view; return whether that was possible.

    Args:
        count: its elements.
        stride: its step.
        follow: that of the other view.
        axes: of the tensor.
        last: the highest index that is reached so far along each; grows.
        walks: grows.
    """
    while count > 1:
        found = next((place for place, row in enumerate(axes) if row[2] <= stride), None)
        if found is None or not stride:
            return False
        axis, size, own = axes[found]
        step, aslant = divmod(stride, own)
        if aslant:
            return False
        part = count
        if last[axis] + step * (count - 1) >= size:  # on to the next dimension, from the end of this one
            part = size // step
            if part < 2 or count % part or last[axis] + step * (part - 1) >= size:
                return False
        last[axis] += step * (part - 1)
        walks.append(Walk(axis, part, step, follow))
        count, stride, follow = count // part, stride * part, follow * part
    return True
