"""Strided copies as columns, in bytes: what is walked to move bytes between memories that are reached by address."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@attrs.frozen(eq=False)
class Boxes:
    """Copies of ``count`` runs of ``run`` bytes each, whose starts are a step apart on either side, as columns.

    Attributes:
        source: int64 ``[boxes]``: where the first run begins.
        target: int64 ``[boxes]``: where it goes.
        run: int64 ``[boxes]``: bytes.
        count: int64 ``[boxes]``: runs; 1 if all is contiguous on both sides.
        source_step: int64 ``[boxes]``: bytes from the start of one run to that of the next; 0 for a single one.
        target_step: int64 ``[boxes]``.
        piece: int64 ``[boxes]``: the piece that it belongs to; one of more than two dimensions has several.
    """

    source: Integers
    target: Integers
    run: Integers
    count: Integers
    source_step: Integers
    target_step: Integers
    piece: Integers

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sizes(self) -> Integers:
        """Bytes of each box, int64 ``[boxes]``."""
        sizes: Integers = self.run * self.count
        return sizes

    @classmethod
    def contiguous(cls, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]) -> Boxes:
        """Return copies of single runs: where from, where to, and how many bytes; each a piece of its own."""
        source, target, run = (np.array(column, dtype=np.int64) for column in (sources, targets, sizes))
        zeros = np.zeros(len(run), dtype=np.int64)
        return cls(source, target, run, zeros + 1, zeros, zeros, np.arange(len(run)))

    @classmethod
    def concatenated(cls, some: Sequence[Boxes]) -> Boxes:
        """Return boxes one after another."""
        names = [field.name for field in attrs.fields(cls)]
        return cls(*(np.concatenate([getattr(boxes, name) for boxes in some]) for name in names))

    def where(self, chosen: Integers) -> Boxes:
        """Return those that a mask or a list of numbers chooses."""
        return Boxes(*(getattr(self, field.name)[chosen] for field in attrs.fields(Boxes)))


@attrs.frozen(eq=False)
class Views:
    """Pairs of strided views of one shape each, as columns: one row per piece.

    Attributes:
        source: int64 ``[pieces]``: where the first element of the one view lies, in bytes.
        target: int64 ``[pieces]``: the same of the other.
        shape: int64 ``[pieces, D]``: elements in each dimension; 1 where a piece has fewer.
        source_steps: int64 ``[pieces, D]``: bytes from one element to the next.
        target_steps: int64 ``[pieces, D]``.
        itemsize: int64 ``[pieces]``: bytes of an element.
    """

    source: Integers
    target: Integers
    shape: Integers
    source_steps: Integers
    target_steps: Integers
    itemsize: Integers

    def boxes(self) -> Boxes:
        """Return the copies from the ones to the others, with as few and as long runs as both sides allow."""
        levels = _levels(self.shape, self.source_steps, self.target_steps, self.itemsize)
        levels.put_longest_first()
        return _expanded(self.source, self.target, levels)


@attrs.define(eq=False)
class _Levels:
    """Nested loops around a run, the innermost first: ``[pieces, depth]`` counts and steps, and the run's bytes."""

    run: Integers
    counts: Integers
    source_steps: Integers
    target_steps: Integers

    def put_longest_first(self) -> None:
        """Exchange each piece's first loop, the only one that is not unrolled, with its longest."""
        longest = self.counts.argmax(axis=1)
        rows = np.flatnonzero(longest)
        longest = longest[rows]
        for column in (self.counts, self.source_steps, self.target_steps):
            column[rows, 0], column[rows, longest] = column[rows, longest], column[rows, 0]


def _levels(shape: Integers, source_steps: Integers, target_steps: Integers, itemsize: Integers) -> _Levels:
    """Join dimensions, from the last to the first, that continue each other on both sides."""
    pieces, dims = shape.shape
    levels = _Levels(itemsize.copy(), *(np.full((pieces, dims), fill, dtype=np.int64) for fill in (1, 0, 0)))
    depth = np.zeros(pieces, dtype=np.int64)  # of loops that are open; 0: only the run
    rows = np.arange(pieces)
    for dim in range(dims - 1, -1, -1):
        size, from_source, from_target = shape[:, dim], source_steps[:, dim], target_steps[:, dim]
        real = size != 1
        last = np.maximum(depth - 1, 0)
        open_count = levels.counts[rows, last]
        grows = real & (depth == 0) & (from_source == levels.run) & (from_target == levels.run)
        joins = (
            real
            & (depth > 0)
            & (from_source == levels.source_steps[rows, last] * open_count)
            & (from_target == levels.target_steps[rows, last] * open_count)
        )
        opens = real & ~grows & ~joins
        levels.run[grows] *= size[grows]
        levels.counts[rows[joins], last[joins]] *= size[joins]
        at = rows[opens], depth[opens]
        levels.counts[at], levels.source_steps[at], levels.target_steps[at] = (
            size[opens],
            from_source[opens],
            from_target[opens],
        )
        depth[opens] += 1
    return levels


def _expanded(source: Integers, target: Integers, levels: _Levels) -> Boxes:
    """Unroll the loops beyond the first."""
    piece = np.arange(len(source))
    outer = levels.counts[:, 1:].prod(axis=1)
    which = np.repeat(piece, outer)
    left = np.arange(len(which)) - np.repeat(outer.cumsum() - outer, outer)
    source, target = source[which], target[which]
    for level in range(1, levels.counts.shape[1]):
        count = levels.counts[which, level]
        index = left % count
        left = left // count
        source = source + index * levels.source_steps[which, level]
        target = target + index * levels.target_steps[which, level]
    steps = levels.source_steps[which, 0], levels.target_steps[which, 0]
    return Boxes(source, target, levels.run[which], levels.counts[which, 0], *steps, which)
