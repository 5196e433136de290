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

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Tuning:
    """How the kernel copies.

    Attributes:
        programs: how many share the rows; None has one for each row.
        tile: bytes that a program has under way at once, where a thread moves 16 at a time.
        warps: of a program.
        piece: bytes of a row, about: few rows make a small table, many keep reads and writes close together.
    """

    programs: int | None = None
    tile: int = 32 * 2**10
    warps: int = 8
    piece: int = 128 * 2**10


LOCAL = Tuning()
"""For copies within one GPU: as many programs as there are rows."""


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
        self._launches = [(torch.from_numpy(own.table).to(device), own.unit, own.lanes) for own in rows]
        self.nbytes = sum(table.nbytes for table, *_ in self._launches)
        """Device memory that the tables take."""

    def run(self, bases: torch.Tensor | None = None) -> None:
        """Queue all copies on the current stream of ``device``, which must be the current one.

        Args:
            bases: int64 ``[pieces, 2]`` on ``device``, if addresses are relative: what is added to those of each piece,
                at the source and at the target; multiples of 16.
        """
        from weight_transfer.copying.kernel import copy_boxes

        for table, unit, lanes in self._launches:
            rows, tile, wide = len(table), self._tuning.tile // ELEMENTS[WIDE], unit == WIDE
            copy_boxes[(min(rows, self._tuning.programs or rows),)](
                table,
                table if bases is None else bases,
                rows,
                _element(unit),
                self._relative,
                wide,
                tile if wide else tile // 2,
                lanes,
                num_warps=self._tuning.warps,
            )


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
