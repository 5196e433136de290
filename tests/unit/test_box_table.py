"""The rows of boxes: every byte moves once, as wide as addresses and steps allow. What can be checked without a GPU."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from weight_transfer.copying.boxes import Boxes
from weight_transfer.copying.gpu import LOCAL, GpuCopies, Tuning
from weight_transfer.copying.table import ELEMENTS, Rows, joined, rows_of

_SIZE = 1 << 16


def _walk(launches: list[Rows]) -> None:
    """Do what the kernel does."""
    for rows in launches:
        size = ELEMENTS[rows.unit]
        for source, target, run, count, source_step, target_step, _ in rows.table.tolist():
            numbers = source, target, run * size
            steps = (source_step * size, target_step * size) if count > 1 else (0, 0)
            assert not any(number % rows.unit for number in (*numbers, *steps))
            for index in range(count):
                ctypes.memmove(target + index * steps[1], source + index * steps[0], run * size)


def _boxes(rows: list[tuple[int, ...]], source: int = 0, target: int = 0) -> Boxes:
    begin, end, run, count, source_step, target_step = np.array(rows, dtype=np.int64).reshape(len(rows), 6).T
    return Boxes(begin + source, end + target, run, count, source_step, target_step, np.arange(len(rows)))


def _expected(boxes: list[tuple[int, ...]], source: torch.Tensor) -> torch.Tensor:
    target = torch.zeros_like(source)
    for a, b, run, count, source_step, target_step in boxes:
        for index in range(count):
            start, end = a + index * source_step, b + index * target_step
            target[end : end + run] = source[start : start + run]
    return target


def _random_rows(unit: int, dice: random.Random, room: int = _SIZE) -> list[tuple[int, ...]]:
    """Return up to 40 boxes of runs that are multiples of a unit, in so many bytes on either side."""
    rows: list[tuple[int, ...]] = []
    end = 0
    while True:
        run, count = unit * dice.randint(1, 200), dice.choice([1, 1, 2, 3, 17])
        step = run + unit * dice.choice([0, 1, 5, 16])
        end += unit * dice.choice([0, 0, 1, 3])
        if end + step * count > room or len(rows) == 40:
            return rows
        source_step = run + unit * dice.choice([0, 2, 9])
        start = unit * dice.randint(0, (room - source_step * count) // unit)
        rows.append((start, end, run, count, *((source_step, step) if count > 1 else (0, 0))))
        end += step * count


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("piece", [64, 1024, 128 * 1024])
def test_rows_move_every_byte_of_their_boxes_and_no_other(unit: int, piece: int) -> None:
    source = torch.randint(1, 256, (_SIZE,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    rows = _random_rows(unit, random.Random(unit * piece))
    boxes = _boxes(rows, source.data_ptr(), target.data_ptr())
    launches = rows_of(joined(boxes), piece)
    assert all(
        len(np.unique(own.table[:, 1])) == len(own.table)
        and own.table[:, 2:4].prod(axis=1).max() * ELEMENTS[own.unit] <= piece
        for own in launches
    )
    _walk(launches)
    assert torch.equal(target, _expected(rows, source))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "tuning",
    [LOCAL, Tuning(programs=3), Tuning(tile=4096, warps=2, piece=1024), Tuning(tile=4096, warps=4, piece=2**20)],
    ids=["local", "few programs", "short rows", "rows of many tiles"],
)
@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16])
def test_the_kernel_does_what_the_rows_say(unit: int, tuning: Tuning) -> None:
    device, room = torch.device("cuda", 0), 2**23
    source = torch.randint(1, 256, (room,), dtype=torch.uint8)
    rows = _random_rows(unit, random.Random(unit), room // 2)
    begin = max(end + count * (run + target_step) for _, end, run, count, _, target_step in rows)
    rows.append((0, -(-begin // 16) * 16, unit * (3 * 2**20 // unit), 1, 0, 0))  # beside it, the others are short
    here, there = source.to(device), torch.zeros(room, dtype=torch.uint8, device=device)
    GpuCopies(_boxes(rows, here.data_ptr(), there.data_ptr()), device, tuning).run()
    assert torch.equal(there.cpu(), _expected(rows, source))
    there.zero_()
    bases = torch.tensor([[here.data_ptr(), there.data_ptr()]] * len(rows), device=device)
    GpuCopies(_boxes(rows), device, tuning, relative=True).run(bases)
    assert torch.equal(there.cpu(), _expected(rows, source))


def test_boxes_that_continue_each_other_on_both_sides_become_one() -> None:
    flat = [(300, 1300, 50, 1, 0, 0), (0, 1000, 100, 1, 0, 0), (100, 1100, 200, 1, 0, 0), (900, 5000, 7, 1, 0, 0)]
    merged = joined(_boxes(flat))
    assert list(zip(merged.source, merged.target, merged.run, strict=True)) == [(0, 1000, 350), (900, 5000, 7)]
    strided = [(0, 0, 8, 4, 32, 16), (128, 64, 8, 2, 32, 16), (192, 97, 8, 2, 32, 16)]
    merged = joined(_boxes(strided))
    assert list(zip(merged.source, merged.target, merged.count, strict=True)) == [(0, 0, 6), (192, 97, 2)]


def test_neighbours_on_one_side_only_and_unlike_ones_stay_apart() -> None:
    rows = [(0, 0, 100, 1, 0, 0), (100, 100, 100, 1, 0, 0), (200, 300, 100, 1, 0, 0), (300, 400, 10, 2, 20, 20)]
    merged = joined(_boxes(rows))
    assert list(zip(merged.source, merged.run, merged.count, strict=True)) == [(0, 200, 1), (200, 100, 1), (300, 10, 2)]


def test_a_table_of_a_large_model_is_made_of_columns() -> None:
    count = 20_000
    column = np.arange(count, dtype=np.int64) << 24
    ones, zeros = np.ones(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    boxes = Boxes(column, column + 64, ones * 3 * 2**20, ones, zeros, zeros, zeros)
    [rows] = rows_of(joined(boxes), 128 * 1024)
    assert rows.unit == 16
    assert rows.table.shape == (count * 24, 7)
    assert int(rows.table[:, 2].sum()) * 4 == count * 3 * 2**20
