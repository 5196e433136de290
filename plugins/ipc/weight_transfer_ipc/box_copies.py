"""Strided copies between addresses as a few launches: a table that is made once, and what walks it.

What lies on the GPU itself is copied by as many programs as there are rows. What lies on a peer comes over a link that
a few programs fill, so that the copies on the GPU itself go on beside them; large contiguous blocks of a peer are left
to the copy engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from weight_transfer_ipc import cuda
from weight_transfer_ipc.box_table import ELEMENTS, WIDE, joined, rows_of

if TYPE_CHECKING:
    from weight_transfer.authoring import Boxes


@attrs.frozen(kw_only=True)
class Tuning:
    """How a kernel copies.

    Attributes:
        programs: how many share the rows; None has one for each row.
        tile: bytes that a program has under way at once, where a thread moves 16 at a time.
        warps: of a program.
        piece: bytes of a row, about.
        engine_bytes: from here on a contiguous block is left to the copy engines; None leaves none.
    """

    programs: int | None = None
    tile: int = 32 * 2**10
    warps: int = 8
    piece: int = 128 * 2**10
    engine_bytes: int | None = None


LOCAL = Tuning()
PEER = Tuning(programs=264, engine_bytes=8 * 2**20)


class BoxCopies:
    """Copies that are run again and again.

    Args:
        boxes: what to copy; the addresses must be valid on ``device`` whenever it runs.
        device: the GPU that copies.
        tuning: how.
    """

    def __init__(self, boxes: Boxes, device: torch.device, tuning: Tuning) -> None:
        self._device, self._tuning = device, tuning
        large = np.zeros(len(boxes), dtype=np.bool_)
        if tuning.engine_bytes is not None and cuda.has_batches():
            large = (boxes.count == 1) & (boxes.run >= tuning.engine_bytes)
        self._batch = None
        if large.any():  # not joined: the engines refuse a copy that spans allocations
            blocks = boxes.where(np.flatnonzero(large))
            self._batch = cuda.Batch(blocks.source.tolist(), blocks.target.tolist(), blocks.run.tolist())
        rows = rows_of(joined(boxes.where(np.flatnonzero(~large))), tuning.piece)
        self._launches = [(torch.from_numpy(own.table).to(device), own.unit, own.lanes) for own in rows]
        self.nbytes = sum(table.nbytes for table, *_ in self._launches)
        """Device memory that the tables take."""

    def run(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on ``stream``, which must be the current one, on ``device``."""
        if self._batch is not None:
            self._batch.run(stream.cuda_stream, self._device.index)
        for table, unit, lanes in self._launches:
            self._launch(table, unit, lanes)

    def _launch(self, table: torch.Tensor, unit: int, lanes: int) -> None:
        from weight_transfer_ipc.kernels import copy_boxes

        rows, tile = len(table), self._tuning.tile // ELEMENTS[WIDE]
        programs = min(rows, self._tuning.programs or rows)
        wide, warps = unit == WIDE, self._tuning.warps
        copy_boxes[(programs,)](table, rows, _element(unit), wide, tile if wide else tile // 2, lanes, num_warps=warps)


def _element(unit: int) -> Any:
    import triton.language as tl

    return {4: tl.int32, 8: tl.int64, 2: tl.int16, 1: tl.uint8}[ELEMENTS[unit]]
