"""Thousands of copies between addresses as one or two launches, and large blocks of a peer by the copy engines.

On one GPU a kernel copies everything. From a peer GPU the copy engines are faster than a kernel for large blocks, and
slower for small ones, since each copy costs them about a microsecond. A kernel that reads a peer needs few programs to
fill the link; where copies on the GPU itself go on beside them, it gets no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.authoring import LOCAL, GpuCopies, Tuning
from weight_transfer_ipc import cuda

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Boxes

_ENGINE_BYTES = 8 * 2**20  # from here on a contiguous block of a peer is left to the copy engines


@attrs.frozen
class Side:
    """Where the sources of copies lie.

    Attributes:
        by_engine: whether large blocks are left to the copy engines.
        tuning: of the kernel.
    """

    by_engine: bool
    tuning: Tuning = LOCAL


_REACHING = Tuning(tile=32 * 2**10, warps=8)
OWN = Side(by_engine=False)
"""On the GPU that copies."""
PEER = Side(by_engine=True, tuning=_REACHING)
"""On another one."""
PEER_BESIDE = Side(by_engine=True, tuning=attrs.evolve(_REACHING, programs=264))
"""On another one, while copies on the GPU itself go on."""


class Copies:
    """Copies that are run again and again.

    Args:
        boxes: what to copy; the addresses must be valid on ``device`` whenever it runs.
        device: the GPU that copies.
        side: where the sources lie.
    """

    def __init__(self, boxes: Boxes, device: torch.device, side: Side) -> None:
        self._device = device
        self._batch = None
        if side.by_engine and cuda.has_batches():
            large = (boxes.count == 1) & (boxes.run >= _ENGINE_BYTES)
            if large.any():  # not joined: the engines refuse a copy that spans allocations
                blocks = boxes.where(np.flatnonzero(large))
                self._batch = cuda.Batch(blocks.source.tolist(), blocks.target.tolist(), blocks.run.tolist())
                boxes = boxes.where(np.flatnonzero(~large))
        self._others = GpuCopies(boxes, device, side.tuning)

    @property
    def nbytes(self) -> int:
        """Device memory that the tables take."""
        return self._others.nbytes

    def run(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on ``stream``, which must be the current one, on ``device``."""
        if self._batch is not None:
            self._batch.run(stream.cuda_stream, self._device.index)
        self._others.run()
