"""Boxes as the rows of a table that a kernel walks: cut into parts of like size, and sorted by how wide a thread moves.

Everything here is numpy over columns: a model's boxes are tens of thousands of rows.
"""

from __future__ import annotations

import attrs
import numpy as np

from weight_transfer.copying.boxes import Boxes, Integers

WIDE = 16
"""Bytes that a thread moves at a time where addresses, runs and steps allow it."""
ELEMENTS = {WIDE: 4, 8: 8, 4: 4, 2: 2, 1: 1}
"""Bytes of the elements in which rows count, by the bytes that a thread moves."""
_LANES = (512, 64, 8)  # elements of a line: as long as the runs, about, or lanes would idle


@attrs.frozen(eq=False)
class Rows:
    """Rows that one launch copies.

    Attributes:
        unit: bytes that a thread moves at a time: all addresses, runs and steps are multiples of it.
        lanes: elements of a line of the kernel's tile.
        table: int64 ``[rows, 7]``: source and target address; elements of a run, number of runs, elements from the
            start of one run to that of the next on either side; and the piece.
    """

    unit: int
    lanes: int
    table: Integers

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return int((self.table[:, 2] * self.table[:, 3]).sum()) * ELEMENTS[self.unit]


def joined(boxes: Boxes) -> Boxes:
    """Return the boxes with those that continue each other on both sides made one."""
    if len(boxes) < 2:
        return boxes
    boxes = boxes.where(np.argsort(boxes.source, kind="stable"))
    source_step, target_step = _steps(boxes)
    flat = (source_step == boxes.run) & (target_step == boxes.run)
    like = (boxes.run[1:] == boxes.run[:-1]) & (source_step[1:] == source_step[:-1])
    like &= target_step[1:] == target_step[:-1]
    continues = like | (flat[1:] & flat[:-1])
    continues &= boxes.source[1:] == (boxes.source + boxes.count * source_step)[:-1]
    continues &= boxes.target[1:] == (boxes.target + boxes.count * target_step)[:-1]
    first = np.flatnonzero(np.concatenate(([True], ~continues)))
    kept = boxes.where(first)
    run = np.where(flat[first], np.add.reduceat(boxes.sizes, first), kept.run)
    count = np.where(flat[first], 1, np.add.reduceat(boxes.count, first))
    return attrs.evolve(kept, run=run, count=count)


def rows_of(boxes: Boxes, piece: int) -> list[Rows]:
    """Cut boxes into rows of at most ``piece`` bytes, a multiple of 16; return them by what a launch has in common."""
    boxes = boxes.where(np.flatnonzero(boxes.sizes > 0))
    alone = (boxes.count == 1) | (boxes.run >= piece)
    singles = _singles(boxes.where(np.flatnonzero(alone)))
    unit = _unit(singles.source | singles.target)
    bulk = singles.run // unit * unit
    rest = singles.run - bulk
    parts, part_of = _pieces(attrs.evolve(singles, run=bulk), piece)
    tails = attrs.evolve(singles, source=singles.source + bulk, target=singles.target + bulk, run=rest)
    tails = tails.where(np.flatnonzero(rest))
    several = _groups(boxes.where(np.flatnonzero(~alone)), piece)
    steps = several.source_step | several.target_step
    units = [
        unit[part_of],
        np.ones(len(tails), dtype=np.int64),
        _unit(several.source | several.target | several.run | steps),
    ]
    return _launches(Boxes.concatenated([parts, tails, several]), np.concatenate(units))


def _launches(boxes: Boxes, units: Integers) -> list[Rows]:
    elements = boxes.run // np.array([ELEMENTS.get(unit, 1) for unit in range(WIDE + 1)])[units]
    fitting = [np.where(boxes.count == 1, True, elements > lanes * 3 // 4) for lanes in _LANES[:-1]]
    lanes = np.select(fitting, _LANES[:-1], _LANES[-1])
    found = []
    for unit, size in ELEMENTS.items():
        for width in _LANES:
            own = boxes.where(np.flatnonzero((units == unit) & (lanes == width)))
            if len(own):
                steps = own.source_step // size, own.target_step // size
                table = np.stack((own.source, own.target, own.run // size, own.count, *steps, own.piece), axis=1)
                found.append(Rows(unit, width, table))
    return found


def _repeated(boxes: Boxes, times: Integers) -> tuple[Boxes, Integers, Integers]:
    """Return each box several times, with which one it was, and how many of it came before."""
    which = np.repeat(np.arange(len(times)), times)
    return boxes.where(which), which, np.arange(len(which)) - (times.cumsum() - times)[which]


def _singles(boxes: Boxes) -> Boxes:
    """Make each run a box of its own."""
    own, which, index = _repeated(boxes, boxes.count)
    nothing = np.zeros(len(which), dtype=np.int64)
    return attrs.evolve(
        own,
        source=own.source + index * own.source_step,
        target=own.target + index * own.target_step,
        count=nothing + 1,
        source_step=nothing,
        target_step=nothing,
    )


def _pieces(singles: Boxes, piece: int) -> tuple[Boxes, Integers]:
    """Cut single runs into parts of at most ``piece`` bytes; return which one each was of, too."""
    own, which, index = _repeated(singles, -(-singles.run // piece))
    start = index * piece
    run = np.minimum(own.run - start, piece)
    return attrs.evolve(own, source=own.source + start, target=own.target + start, run=run), which


def _groups(boxes: Boxes, piece: int) -> Boxes:
    """Cut boxes of several runs into ones with as many runs as make ``piece`` bytes."""
    most = piece // boxes.run
    own, which, index = _repeated(boxes, -(-boxes.count // most))
    first = index * most[which]
    return attrs.evolve(
        own,
        source=own.source + first * own.source_step,
        target=own.target + first * own.target_step,
        count=np.minimum(own.count - first, most[which]),
    )


def _steps(boxes: Boxes) -> tuple[Integers, Integers]:
    single = boxes.count == 1
    return np.where(single, boxes.run, boxes.source_step), np.where(single, boxes.run, boxes.target_step)


def _unit(bits: Integers) -> Integers:
    """Return the largest power of two, up to `WIDE`, that divides the numbers whose bits are or-ed together."""
    bits = bits | WIDE
    unit: Integers = bits & -bits
    return unit
