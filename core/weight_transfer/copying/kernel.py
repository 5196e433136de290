"""The copy kernel, in Triton, which torch's CUDA builds for Linux bring along."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tiles", "parts"])  # type: ignore[untyped-decorator]
def copy_boxes(  # type: ignore[no-untyped-def]  # Triton's own types
    table,
    bases,
    tiles,
    parts,
    element: tl.constexpr,
    relative: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
    lanes: tl.constexpr,
):
    """Copy the rows of ``table``, int64 columns of `weight_transfer.copying.table.Rows`.

    Each row is cut into ``parts``, which makes ``tiles`` in all; programs share these. A part is every so many-th tile
    of its row: one, if the row is as long as most are.

    If ``relative``, ``bases``, int64 ``[pieces, 2]``, are added to the addresses. Lengths and steps are in elements of
    ``element``. If ``wide``, all are multiples of 16 bytes. ``tile`` elements are under way at once, in lines of
    ``lanes`` where a row has several runs.
    """
    lines: tl.constexpr = tile // lanes
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = number % parts
        row = table + (number // parts).to(tl.int64) * 7
        from_address = tl.load(row)
        to_address = tl.load(row + 1)
        if relative:
            base = bases + tl.load(row + 6) * 2
            from_address += tl.load(base)
            to_address += tl.load(base + 1)
        source = from_address.to(tl.pointer_type(element))
        target = to_address.to(tl.pointer_type(element))
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
            for start in range(part * tile, run, parts * tile):
                index = start + tl.arange(0, tile)
                inside = index < run
                tl.store(target + index, tl.load(source + index, mask=inside), mask=inside)
        else:
            for first_line in range(part * lines, count, parts * lines):
                for first_lane in range(0, run, lanes):
                    line = (first_line + tl.arange(0, lines))[:, None]
                    lane = (first_lane + tl.arange(0, lanes))[None, :]
                    within = (line < count) & (lane < run)
                    far = line.to(tl.int64)
                    value = tl.load(source + (far * source_step + lane), mask=within)
                    tl.store(target + (far * target_step + lane), value, mask=within)
