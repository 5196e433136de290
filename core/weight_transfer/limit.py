"""What bounds an update: the same bytes, moved by what a backend is built on, and nothing around it.

A backend's descriptor names a function that makes its `Limit` for one process; without one, `CopyLimit` stands in. Who
calls what, for the trainer's ranks and the workers:

    each trainer rank           each worker
    -----------------           -----------
    1. offer() -> offer
    2. join(offers)             join(offers)        all at the same time, with the offers of all ranks
    for every round:
    3. run() -> seconds         run() -> seconds    all at the same time; the slowest counts
    4. close()                  close()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from weight_transfer.config.settings import WeightTransferConfig

_THREADS = 8  # at most; memory has no more to give

Seconds = tuple[float, float]
"""Wall time, and the CPU time of the thread."""


@attrs.frozen(kw_only=True)
class LimitSide:
    """One process that takes part in a limit.

    Attributes:
        config: of the backend.
        member: number of this process; the trainer's ranks come first.
        trainers: devices of the trainer's ranks.
        device: of this process's weights.
        sizes: on a worker the bytes that it takes from each trainer rank, on a trainer rank those that it gives each
            worker.
        alike: whether every worker takes the same: all bytes of the only trainer rank.
    """

    config: WeightTransferConfig
    member: int
    trainers: Sequence[torch.device]
    device: torch.device
    sizes: Sequence[int]
    alike: bool

    @property
    def is_trainer(self) -> bool:
        """Whether this is a rank of the trainer."""
        return self.member < len(self.trainers)


class Limit:
    """One side of a limit; this one has nothing to do.

    Attributes:
        what: what is moved how, for reports: a clause without a full stop.
    """

    what = ""

    def __init__(self, side: LimitSide) -> None:
        """Keep the side. Acquire nothing yet."""
        self.side = side

    def offer(self) -> Any:
        """Make a trainer rank's side ready; return what the others need to know of it, JSON-safe."""
        return None

    def join(self, offers: Sequence[Any]) -> None:
        """Get ready on this side, together with all others; ``offers`` are by trainer rank."""

    def run(self) -> Seconds:
        """Move all bytes once, together with all others; return how long that took here, in seconds."""
        return 0.0, 0.0

    def close(self) -> None:
        """Give back everything."""


class CopyLimit(Limit):
    """One contiguous copy in each worker, of as many bytes as it takes, in the memory of its own device.

    In host memory it is made by one thread and by one for each core; the faster way counts.
    """

    what = "one plain copy of as many bytes, in each worker"

    def join(self, offers: Sequence[Any]) -> None:
        if not self.side.is_trainer:
            self._source = torch.ones(sum(self.side.sizes), dtype=torch.uint8, device=self.side.device)
            self._target = torch.zeros_like(self._source)

    def run(self) -> Seconds:
        if self.side.is_trainer:
            return 0.0, 0.0
        if self.side.device.type != "cpu":
            return timed(self._copy, self.side.device)
        ways = {1, min(_THREADS, os.cpu_count() or 1)}
        return min(self._copy_with(threads) for threads in ways)

    def _copy_with(self, threads: int) -> Seconds:
        with _threads(threads):
            return timed(self._copy, self.side.device)

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def close(self) -> None:
        self._source = self._target = torch.empty(0)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Have torch compute with so many threads in a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> Seconds:
    """Return the wall time and the thread's CPU time of a call, until the device has done all of it.

    A GPU does it once before: one that has rested begins slowly.
    """
    if device.type == "cuda":
        call()
    settle(device)
    since, cpu = time.perf_counter(), time.thread_time()
    call()
    settle(device)
    return time.perf_counter() - since, time.thread_time() - cpu
