"""Copies that a GPU makes again and again: a table that is made once, and what walks it."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.copying.table import ELEMENTS, WIDE, joined, rows_of

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Boxes
    from weight_transfer.copying.table import Rows

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Tuning:
    """How the kernel copies.

    Attributes:
        programs: how many share the tiles; None has one for each.
        tile: bytes that a program has under way at once, where a thread moves 16 at a time.
        warps: of a program.
        piece: bytes of a row, about: of many tiles, for a small table.
    """

    programs: int | None = None
    tile: int = 16 * 2**10
    warps: int = 16
    piece: int = 128 * 2**10


LOCAL = Tuning()
"""For copies within one GPU: a program for each tile, so that the GPU reads and writes close together."""

_MOST_PARTS = 64


class GpuCopies:
    """Copies between addresses, as one launch or a few (`has_kernel`).

    Args:
        boxes: what to copy; the addresses must be valid on ``device`` whenever it runs.
        device: the GPU that copies.
        tuning: how.
        relative: whether addresses are offsets from bases that each run is given; boxes are not joined then.
    """

    def __init__(self, boxes: Boxes, device: torch.device, tuning: Tuning = LOCAL, relative: bool = False) -> None:
        self._device, self._tuning, self._relative = device, tuning, relative
        rows = rows_of(boxes if relative else joined(boxes), tuning.piece)
        self._launches = [self._launch(own) for own in rows]
        self.nbytes = sum(launch.table.nbytes for launch in self._launches)
        """Device memory that the tables take."""

    def run(self, bases: torch.Tensor | None = None) -> None:
        """Queue all copies on the current stream of ``device``, which must be the current one.

        Args:
            bases: int64 ``[pieces, 2]`` on ``device``, if addresses are relative: what is added to those of each piece,
                at the source and at the target; multiples of 16.
        """
        from weight_transfer.copying.kernel import copy_boxes

        for launch in self._launches:
            table, tiles = launch.table, launch.parts * len(launch.table)
            copy_boxes[(min(tiles, self._tuning.programs or tiles),)](
                table,
                table if bases is None else bases,
                tiles,
                launch.parts,
                _element(launch.unit),
                self._relative,
                launch.unit == WIDE,
                launch.tile,
                launch.lanes,
                num_warps=self._tuning.warps,
            )

    def _launch(self, rows: Rows) -> _Launch:
        tile = self._tuning.tile // ELEMENTS[WIDE] // (1 if rows.unit == WIDE else 2)
        mean = rows.nbytes / len(rows.table)
        parts = min(max(round(mean / (tile * ELEMENTS[rows.unit])), 1), _MOST_PARTS)
        return _Launch(torch.from_numpy(rows.table).to(self._device), rows.unit, rows.lanes, tile, parts)


@attrs.frozen
class _Launch:
    """What the kernel is given.

    Attributes:
        table: the rows.
        unit: bytes that a thread moves at a time.
        lanes: elements of a line.
        tile: elements that a program has under way at once.
        parts: into which rows are cut: as many tiles as they have on an average.
    """

    table: torch.Tensor
    unit: int
    lanes: int
    tile: int
    parts: int


@cache
def has_kernel() -> bool:
    """Whether the kernel can run here; says so once if it cannot."""
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "Triton is not installed: weights are copied on GPUs by torch's own operations, at about two thirds of "
            "the speed; pip install triton"
        )
        return False
    return True


@cache
def _element(unit: int) -> Any:
    import triton.language as tl

    return {4: tl.int32, 8: tl.int64, 2: tl.int16, 1: tl.uint8}[ELEMENTS[unit]]
