"""What ``benchmarks/rdma.py`` sets beside updates: NIXL's reads with nothing around them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from weight_transfer.limit import Limit, timed
from weight_transfer.values.deadline import Deadline
from weight_transfer_rdma.limit import ReadLimit

if TYPE_CHECKING:
    from weight_transfer.bench.schemes import SchemeSide
    from weight_transfer_rdma.nixl import Rows

BLOCK = 4 * 2**30
"""Bytes in which the tensors of `PerTensor` lie again and again: weights and the limit leave no room for as many."""
LONG = 120.0  # seconds
_ALIGNED = 256  # bytes


class PerTensor(ReadLimit):
    """NIXL as it comes: one descriptor for each weight, none merged, between memory of their own."""

    side: SchemeSide
    what = "one NIXL read with a descriptor for each weight"
    reads = False

    def room(self, nbytes: int) -> int:
        return min(BLOCK, sum(map(_aligned, self._sizes)))

    def rows(self, here: int, there: int, nbytes: int) -> Rows:
        rows, at = [], 0
        for size in self._sizes:
            at = 0 if at + size > BLOCK else at
            rows.append((here + at, there + at, size))
            at += _aligned(size)
        return np.array(rows, dtype=np.uint64)

    @property
    def _sizes(self) -> list[int]:
        return [weight.nbytes for weight in self.side.process.weights().values()]


class BareRead(Limit):
    """What a worker's engine has prepared for the weights that it reads where they lie."""

    side: SchemeSide
    what = "the engine's prepared reads"

    def join(self, offers: Sequence[Any]) -> None:
        self._handles: list[int] = []
        if not self.side.is_trainer:
            engine = self.side.process.engine
            self._agent = engine._agent  # noqa: SLF001  (measured by itself)
            jobs = engine._jobs  # noqa: SLF001
            self._handles = [job.handle for job in jobs if job.handle is not None and not job.bucket]

    def run(self) -> tuple[float, float]:
        return timed(partial(self._read, Deadline(LONG)), self.side.device)

    def _read(self, deadline: Deadline) -> None:
        for handle in self._handles:
            self._agent.start(handle, 0, deadline)
        for _ in self._handles:
            self._agent.finish(deadline)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
