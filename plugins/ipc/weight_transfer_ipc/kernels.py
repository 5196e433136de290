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
