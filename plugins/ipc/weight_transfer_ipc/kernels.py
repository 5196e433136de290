"""The copy kernel, in Triton, which torch's CUDA builds for Linux bring along."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def copy_pieces(table, element: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    """Copy one row of ``table`` per program: int64 columns of source address, target address and bytes.

    ``element`` is int32 where addresses and lengths are multiples of 16 bytes, so that each thread moves 16 bytes at a
    time, else uint8. ``tile`` elements are under way at once.
    """
    row = table + tl.program_id(0).to(tl.int64) * 3
    source = tl.load(row).to(tl.pointer_type(element))
    target = tl.load(row + 1).to(tl.pointer_type(element))
    count = tl.load(row + 2)
    if element == tl.int32:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        count = tl.multiple_of(count // 4, 4)
    for start in range(0, count, tile):
        index = start + tl.arange(0, tile)
        inside = index < count
        tl.store(target + index, tl.load(source + index, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def copy_boxes(  # type: ignore[no-untyped-def]  # Triton's own types
    table, rows, element: tl.constexpr, wide: tl.constexpr, tile: tl.constexpr, lanes: tl.constexpr
):
    """Copy the ``rows`` of ``table``, int64 columns of `weight_transfer_ipc.box_table.Rows`; programs share them.

    Lengths and steps are in elements of ``element``. If ``wide``, all are multiples of 16 bytes. ``tile`` elements are
    under way at once, in lines of ``lanes`` where a row has several runs.
    """
    lines: tl.constexpr = tile // lanes
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = table + number.to(tl.int64) * 6  # type: ignore[attr-defined]
        source = tl.load(row).to(tl.pointer_type(element))
        target = tl.load(row + 1).to(tl.pointer_type(element))
        run = tl.load(row + 2).to(tl.int32)
        count = tl.load(row + 3).to(tl.int32)
        source_step = tl.load(row + 4)
        target_step = tl.load(row + 5)
        if wide:
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
            run = tl.multiple_of(run, 4)
            source_step = tl.multiple_of(source_step, 4)
            target_step = tl.multiple_of(target_step, 4)
        if count == 1:
            for start in range(0, run, tile):
                index = start + tl.arange(0, tile)
                inside = index < run
                tl.store(target + index, tl.load(source + index, mask=inside), mask=inside)
        else:
            for first_line in range(0, count, lines):
                for first_lane in range(0, run, lanes):
                    line = (first_line + tl.arange(0, lines))[:, None]
                    lane = (first_lane + tl.arange(0, lanes))[None, :]
                    within = (line < count) & (lane < run)
                    far = line.to(tl.int64)
                    value = tl.load(source + (far * source_step + lane), mask=within)
                    tl.store(target + (far * target_step + lane), value, mask=within)
