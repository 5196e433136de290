"""Whether writes into a tensor lie apart, and how many of its elements they reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import gcd
from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.lib.stride_tricks import as_strided

from weight_transfer.model.strided import Strided, Walk, Walks, walks_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANY = 512


@attrs.frozen
class Reach:
    """What writes do to a tensor.

    Attributes:
        elements: how many elements of it they write; meaningless if some overlap.
        overlap: numbers of two writes that have an element in common (one number twice: a write that has one element
            several times); None if there are none.
    """

    elements: int
    overlap: tuple[int, int] | None


def reach_of(writes: Sequence[Strided], tensor: Strided) -> Reach:
    """Compare the writes into a tensor without looking at each element, wherever that can be avoided.

    Args:
        writes: views in the tensor, which lie between its first and its last element.
        tensor: all of it.
    """
    elements = sum(write.numel for write in writes)
    dense = tensor.numel == tensor.end - tensor.offset
    boxes = {} if dense else {number: walks_of(write, tensor) for number, write in enumerate(writes)}
    if None in boxes.values():
        return _reach_on_map(writes, tensor)
    if not all(write.is_injective for write in writes):
        return _reach_on_map(writes, tensor)
    for group in _touching(writes):
        if len(group) > _MANY:
            return _reach_on_map(writes, tensor)
        placed = {number: walks_of(writes[number], tensor) for number in group}
        lines = {number: _lines(walks) for number, walks in placed.items()}
        if None in lines.values():
            return _reach_on_map(writes, tensor)
        for one, two in combinations(group, 2):
            if all(map(_meet, lines[one] or (), lines[two] or ())):
                return Reach(elements, (one, two))
    return Reach(elements, None)


def _touching(writes: Sequence[Strided]) -> Iterator[list[int]]:
    """Yield the numbers of writes whose extents overlap one by one; strided ones may still lie between each other."""
    order = sorted((number for number, write in enumerate(writes) if write.numel), key=lambda n: writes[n].offset)
    group: list[int] = []
    end = 0
    for number in order:
        if writes[number].offset >= end:
            if len(group) > 1:
                yield group
            group = []
        group.append(number)
        end = max(end, writes[number].end)
    if len(group) > 1:
        yield group


def _lines(walks: Walks | None) -> list[tuple[int, Walk]] | None:
    """Return start and walk along each dimension; None if that does not describe all elements."""
    joined = walks.per_axis() if walks is not None else None
    return list(zip(walks.start, joined, strict=True)) if walks is not None and joined is not None else None


def _meet(one: tuple[int, Walk], two: tuple[int, Walk]) -> bool:
    """Whether two walks along one dimension have an index in common."""
    (a, first), (b, second) = one, two
    low = max(a, b)
    high = min(a + first.step * (first.size - 1), b + second.step * (second.size - 1))
    common = gcd(first.step, second.step)
    if (b - a) % common:
        return False
    period = second.step // common
    turns = (b - a) // common * pow(first.step // common, -1, period) % period if period > 1 else 0
    index, every = a + turns * first.step, first.step * period  # one index in common, and how often they come
    return index + max(0, -(-(low - index) // every)) * every <= high


def _reach_on_map(writes: Sequence[Strided], tensor: Strided) -> Reach:
    """Mark each element on a map: one byte for each between the tensor's first and last."""
    found = _map(tensor)
    for number, write in enumerate(writes):
        own = _on(found, write, tensor)
        if own.any():
            return Reach(0, (_first_that_meets(write, writes, tensor), number))
        own[...] = True
    if np.count_nonzero(found) != sum(write.numel for write in writes):
        number = next(number for number, write in enumerate(writes) if _folds(write, tensor))
        return Reach(0, (number, number))
    return Reach(int(np.count_nonzero(_on(found, tensor, tensor))), None)


def _first_that_meets(later: Strided, writes: Sequence[Strided], tensor: Strided) -> int:
    found = _map(tensor)
    _on(found, later, tensor)[...] = True
    return next(number for number, write in enumerate(writes) if _on(found, write, tensor).any())


def _folds(write: Strided, tensor: Strided) -> bool:
    found = _map(tensor)
    _on(found, write, tensor)[...] = True
    return int(np.count_nonzero(found)) != write.numel


def _map(tensor: Strided) -> NDArray[np.bool_]:
    return np.zeros(tensor.end - tensor.offset, dtype=np.bool_)


def _on(found: NDArray[np.bool_], view: Strided, tensor: Strided) -> NDArray[np.bool_]:
    return as_strided(found[view.offset - tensor.offset :], view.shape, view.stride)
