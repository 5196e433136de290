"""The reads of one update, of which some are under way while what others brought is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer_rdma.nixl import DRAM, VRAM

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_rdma.memory import RunningAgent

DEPTH = {DRAM: 4, VRAM: 16}
"""Reads under way, from each trainer rank; fewer if the staging buckets are fewer. A GPU queues them: the more it has,
the less often this process has to be there in time for the next one."""


@attrs.frozen(eq=False)
class Job:
    """One read, and what to do when it is done.

    Attributes:
        handle: the prepared read; None if there is nothing to read.
        bucket: which bucket of the update the trainer must have filled, counted from 1; 0 for a read of the weights
            where they lie.
        nbytes: to be read from where the weights lie; 0 for a bucket, for which the trainer may have to be waited for.
        load: called with the taker after the read.
        claim: called with the taker before a read into the worker's own tensors.
        buffered: whether it is read into a staging bucket, which is free again when ``load`` has ended.
        rank: the trainer rank from which it reads.
    """

    handle: int | None
    bucket: int
    nbytes: int
    load: Callable[[Any], None]
    claim: Callable[[Any], None] | None = None
    buffered: bool = False
    rank: int = 0


class Reading:
    """The jobs of one update.

    Args:
        agent: reads.
        jobs: in order.
        buffers: how many staging buckets they share.
        filled: by trainer rank, the buckets that it had filled before this update.
        taker: to whom the weights go.
        settle_copies: waits until what ``load`` has queued is done.
        deadline: of the update.
        depth: reads that may be under way at a time.

    Attributes:
        nbytes: read so far from where the weights lie.
        seconds: spent on nothing but these reads.
    """

    def __init__(
        self,
        agent: RunningAgent,
        jobs: list[Job],
        buffers: int,
        filled: Mapping[int, int],
        taker: Any,
        settle_copies: Callable[[], None],
        deadline: Deadline,
        depth: int,
    ) -> None:
        self._agent, self._taker, self._deadline, self._depth = agent, taker, deadline, depth
        self._waiting, self._under_way = deque(jobs), deque[Job]()
        self.nbytes, self.seconds = 0, 0.0
        self._buffers, self._filled, self._settle_copies = buffers, filled, settle_copies

    def run(self) -> None:
        """Read and load everything."""
        self._start_all()
        while self._under_way:
            job = self._under_way[0]
            self._finish(job)
            if not job.buffered:
                self._under_way.popleft()
            self._start_all()
            job.load(self._taker)
            if job.buffered:
                self._settle_copies()
                self._under_way.popleft()
                self._start_all()

    def _start_all(self) -> None:
        """Begin all reads that may be under way now."""
        while self._waiting and len(self._under_way) < self._depth and self._has_room(self._waiting[0]):
            self._start()

    def _has_room(self, job: Job) -> bool:
        """Whether a staging bucket is free for a job, that is, holds nothing that is still to be loaded."""
        return not job.buffered or sum(other.buffered for other in self._under_way) < self._buffers

    def _start(self) -> None:
        job = self._waiting.popleft()
        self._under_way.append(job)
        if job.claim is not None:
            job.claim(self._taker)
        if job.handle is not None:
            with self._timed(job):
                bucket = self._filled[job.rank] + job.bucket if job.bucket else 0
                self._agent.start(job.handle, bucket, self._deadline)

    def _finish(self, job: Job) -> None:
        if job.handle is not None:
            with self._timed(job):
                self._agent.finish(self._deadline)
            self.nbytes += job.nbytes

    @contextmanager
    def _timed(self, job: Job) -> Iterator[None]:
        since = time.perf_counter()
        yield
        if job.nbytes:
            self.seconds += time.perf_counter() - since
