"""How a tensor is cut along the dimensions of a mesh, and which blocks of it one rank gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, product

import attrs

from weight_transfer.model.regions import Region

Run = tuple[int, int]
"""Indices of one dimension that follow each other: the first, and how many."""


@attrs.frozen
class Cut:
    """A dimension is cut along one dimension of a mesh, and this rank has one part of it.

    Attributes:
        dim: of the tensor.
        parts: how many; sizes are those of `torch.chunk`.
        index: which one this rank has.
        strips: the tensor is first cut into so many strips, and each of them into parts (``_StridedShard``).
    """

    dim: int
    parts: int
    index: int
    strips: int = 1


def blocks_of(shape: Sequence[int], cuts: Iterable[Cut]) -> tuple[tuple[int, ...], list[tuple[Region, Region]]]:
    """Cut a tensor, each time what the cut before has left.

    Returns:
        The shape of what is left, and its blocks without empty ones: each within the full shape, and within what is
        left.
    """
    runs: list[list[Run]] = [[(0, size)] for size in shape]
    for cut in cuts:
        runs[cut.dim] = _part(runs[cut.dim], cut)
    spans = [
        [(start, begin, size) for (start, size), begin in zip(own, accumulate(_sizes(own), initial=0), strict=False)]
        for own in runs
    ]
    blocks = []
    for chosen in product(*spans):
        sizes = [size for _, _, size in chosen]
        if 0 not in sizes:
            blocks.append(
                (Region((start for start, _, _ in chosen), sizes), Region((begin for _, begin, _ in chosen), sizes))
            )
    return tuple(sum(_sizes(own)) for own in runs), blocks


@lru_cache(maxsize=4096)
def is_one_order(size: int, cuts: tuple[tuple[int, int], ...]) -> bool:
    """Whether it makes no difference if strips are cut, or the cuts are made in the order that strips stand for.

    FSDP2 cuts what tensor parallelism has cut before, although its mesh dimension comes first; ``_StridedShard`` says
    so by strips. With sizes that cannot be divided a rank may get other elements, and no rank can see it.

    Args:
        size: of the dimension.
        cuts: all of it, in the order of the mesh: parts and strips of each.
    """
    order = None if all(strips == 1 for _, strips in cuts) else _order_of(cuts)
    if order is None or size % math.prod(parts for parts, _ in cuts) == 0:
        return True
    for indices in product(*(range(parts) for parts, _ in cuts)):
        stripped = [Cut(0, parts, index, strips) for (parts, strips), index in zip(cuts, indices, strict=True)]
        ordered = [Cut(0, cuts[number][0], indices[number]) for number in order]
        if blocks_of([size], stripped) != blocks_of([size], ordered):
            return False
    return True


def _order_of(cuts: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return the numbers of cuts, first one first, each after those that make its strips; None if there is no such."""
    order: list[int] = []
    for number, (_, strips) in reversed([*enumerate(cuts)]):
        before = accumulate((cuts[other][0] for other in order), int.__mul__, initial=1)
        place = next((place for place, made in enumerate(before) if made == strips), None)
        if place is None:
            return None
        order.insert(place, number)
    return order


def _part(runs: list[Run], cut: Cut) -> list[Run]:
    """Return the runs of one part of a dimension of which ``runs`` are left."""
    found: list[Run] = []
    for index in range(cut.strips):
        strip = Region.split((sum(_sizes(runs)),), 0, index, cut.strips)
        part = Region.split(strip.shape, 0, cut.index, cut.parts)
        for start, size in _between(runs, strip.offset[0] + part.offset[0], part.shape[0]):
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + size)
            else:
                found.append((start, size))
    return found


def _between(runs: list[Run], begin: int, count: int) -> Iterable[Run]:
    """Yield the runs of ``count`` indices from number ``begin`` on."""
    for start, size in runs:
        skipped = min(begin, size)
        taken = min(size - skipped, count)
        if taken:
            yield start + skipped, taken
        begin, count = begin - skipped, count - taken


def _sizes(runs: list[Run]) -> list[int]:
    return [size for _, size in runs]
