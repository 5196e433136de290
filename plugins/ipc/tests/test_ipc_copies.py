"""The tables of copies, and foreign memory as tensors: what can be checked without a GPU."""

from __future__ import annotations

import ctypes

import torch

from weight_transfer_ipc.copies import Spans, Table
from weight_transfer_ipc.device_memory import bytes_at


def _run(rows: torch.Tensor) -> None:
    for source, target, nbytes in rows.tolist():
        ctypes.memmove(target, source, nbytes)


def _spans(source: torch.Tensor, target: torch.Tensor, pieces: list[tuple[int, int, int]]) -> Spans:
    """Return copies of ``(from, to, bytes)`` between two tensors."""
    columns = zip(*((source.data_ptr() + a, target.data_ptr() + b, n) for a, b, n in pieces), strict=True)
    return Spans.of(*columns)


def test_a_table_moves_every_byte_once_whatever_its_alignment() -> None:
    source = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
    target, expected = torch.zeros_like(source), torch.zeros_like(source)
    pieces = [(0, 16, 4096), (4099, 5000, 77), (5003, 6001, 1), (6000, 7008, 1605), (9984, 9984, 16)]
    for a, b, n in pieces:
        expected[b : b + n] = source[a : a + n]
    table = Table.of(_spans(source, target, pieces), piece=256)
    assert int(table.wide[:, 2].max()) <= 256
    assert not (table.wide % 16).any()
    assert int(table.wide[:, 2].sum() + table.narrow[:, 2].sum()) == sum(n for _, _, n in pieces)
    _run(table.wide)
    _run(table.narrow)
    assert torch.equal(target, expected)


def test_copies_that_continue_each_other_on_both_sides_become_one() -> None:
    spans = Spans.of((300, 0, 100, 900), (1300, 1000, 1100, 5000), (50, 100, 200, 7)).merged()
    assert spans.sources.tolist() == [0, 900]
    assert spans.targets.tolist() == [1000, 5000]
    assert spans.sizes.tolist() == [350, 7]


def test_neighbours_on_one_side_only_stay_apart() -> None:
    spans = Spans.of((0, 100, 200), (0, 100, 300), (100, 100, 100)).merged()
    assert spans.sizes.tolist() == [200, 100]


def test_one_copy_alone_is_a_table_too() -> None:
    table = Table.of(Spans.of((32,), (64,), (48,)))
    assert table.wide.tolist() == [[32, 64, 48]]
    assert not len(table.narrow)


def test_foreign_memory_is_a_tensor_and_stays_its_owners() -> None:
    memory = (ctypes.c_uint8 * 64)(*range(64))
    view = bytes_at(ctypes.addressof(memory), 64, torch.device("cpu"))[8:24].view(torch.int16)
    assert view.tolist() == torch.arange(8, 24, dtype=torch.uint8).view(torch.int16).tolist()
    memory[8] = 200
    assert view.view(torch.uint8)[0] == 200
    del view
    assert memory[9] == 9
