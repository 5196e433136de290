"""What bounds memory that processes share: copies of contiguous blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from weight_transfer.authoring import CopyLimit, Limit, LimitSide, timed
from weight_transfer_ipc import cuda

_BLOCK = 2 * 2**30  # bytes


def limit(side: LimitSide) -> Limit:
    """Return this process's side: a plain copy in host memory, or copies on each worker's GPU and from its peers."""
    return SideBySideLimit(side) if side.device.type == "cuda" else CopyLimit(side)


class SideBySideLimit(Limit):
    """Each worker copies on its own GPU and reads from the others, side by side.

    Source and target are contiguous blocks of up to 2 GiB, copied again and again. A peer is read by the worker's copy
    engines, where the driver has batches of copies, and by torch's own copy; the faster way counts.
    """

    what = "copies of contiguous blocks, on each worker's GPU and from its peers, side by side"

    def join(self, offers: Sequence[Any]) -> None:
        self._lanes: list[tuple[Any, torch.Tensor, torch.Tensor, int]] = []
        if self.side.is_trainer:
            return
        for nbytes, there in zip(self.side.sizes, self.side.trainers, strict=True):
            block = max(min(nbytes, _BLOCK), 1)
            source = torch.ones(block, dtype=torch.uint8, device=there)
            target = torch.zeros(block, dtype=torch.uint8, device=self.side.device)
            target.copy_(source)
            torch.cuda.synchronize(there)
            self._lanes.append((torch.cuda.Stream(self.side.device), source, target, nbytes))

    def run(self) -> tuple[float, float]:
        if self.side.is_trainer:
            return 0.0, 0.0
        return min(timed(partial(self._run, by_engines), self.side.device) for by_engines in (False, True))

    def _run(self, by_engines: bool) -> None:
        for lane, source, target, nbytes in sorted(self._lanes, key=lambda it: it[1].device == self.side.device):
            for start in range(0, nbytes, len(source)):
                self._copy(source, target, min(nbytes - start, len(source)), lane, by_engines)
        for lane, *_ in self._lanes:
            lane.synchronize()

    def _copy(
        self, source: torch.Tensor, target: torch.Tensor, nbytes: int, lane: torch.cuda.Stream, by_engines: bool
    ) -> None:
        device = self.side.device
        if by_engines and source.device != device and cuda.has_batches():
            batch = cuda.Batch([source.data_ptr()], [target.data_ptr()], [nbytes])
            assert device.index is not None
            batch.run(lane.cuda_stream, device.index)
        else:
            with torch.cuda.stream(lane):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)

    def close(self) -> None:
        self._lanes = []
