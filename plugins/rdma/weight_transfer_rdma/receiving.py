"""A worker's side: reads the trainer's memory, into its own parameters where its loader only copies."""

from __future__ import annotations

import logging
import operator
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.authoring import ALIGNMENT, Deadline, destinations_of
from weight_transfer.engine import LoadWeights, WeightTransferEngine
from weight_transfer.errors import HandshakeError, TransferError, TransferTimeoutError
from weight_transfer_rdma.info import PROBE_BYTES, WORD, Endpoint, RdmaInitInfo, RdmaUpdateInfo
from weight_transfer_rdma.jobs import Job, Planner
from weight_transfer_rdma.link import doubt_about, link_rate, slow_link
from weight_transfer_rdma.memory import memory_for
from weight_transfer_rdma.nixl import VRAM, Transport

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import ParallelConfig, WeightTransferConfig
    from weight_transfer_rdma.memory import Arena, Located, RunningAgent

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT = 10.0  # seconds for the first, small read; a GPU's memory over TCP may never arrive
_NOTHING = (object(),)  # is planned for nothing
_DEPTH = 4  # reads under way; fewer if the staging buckets are fewer


class RdmaWorkerEngine(WeightTransferEngine[RdmaInitInfo, RdmaUpdateInfo]):
    """Reads the trainer's weights."""

    init_info_cls = RdmaInitInfo
    update_info_cls = RdmaUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._transport = Transport("unknown", "not joined")
        self._link_rate: float | None = None
        self._doubt: str | None = None
        self._workers = 1
        self._memory = memory_for(parallel_config.device, config.options)
        self._agent: RunningAgent | None = None
        self._rank = 0
        self._probe: Arena | None = None
        self._arena: Arena | None = None
        self._buffers = 0
        self._endpoint: Endpoint | None = None
        self._planned: tuple[object, ...] = _NOTHING
        self._jobs: list[Job] = []

    def init_transfer_engine(self, init_info: RdmaInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        self._rank = init_info.rank_offset + self.parallel_config.rank
        self._workers = init_info.world_size - 1
        self._agent = self._memory.start_agent(f"worker-{secrets.token_hex(8)}", "trainer", True, deadline)
        self._attach(self._agent, init_info.endpoint, deadline)

    def receive_weights(self, update_info: RdmaUpdateInfo, load_weights: LoadWeights) -> None:
        agent = self._agent
        assert agent is not None
        deadline = Deadline(update_info.timeout)
        try:
            self._memory.settle()
            self._attach(agent, update_info.endpoint, deadline)
            destinations = destinations_of(load_weights)
            planned = update_info.manifest, update_info.table, destinations
            reading = self._reading(agent, update_info, load_weights, deadline)
            if self._memory.parted or not all(map(operator.is_, planned, self._planned)) or not reading.start():
                reading.abandon()
                self._plan(agent, update_info, destinations, deadline)
                self._planned = planned
                reading = self._reading(agent, update_info, load_weights, deadline)
            reading.run()
            if self._memory.parted:  # what was read after a fork is not in this process's memory
                raise TransferError("This process forked during the update; send it again.", backend="rdma")
            slow = slow_link(reading.nbytes, reading.seconds, self._transport, self._link_rate, self._workers)
            self.warnings = tuple(filter(None, (self._doubt, slow)))
        except BaseException:
            agent.kill()  # what was under way writes nothing any more
            raise

    def abort_update(self) -> None:
        if self._agent is not None:
            self._agent.kill()

    def shutdown(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._jobs, self._planned, self._endpoint = [], _NOTHING, None
        self._probe = self._arena = None
        self._memory.close()

    @property
    def extra_memory(self) -> int:
        return self._arena.data.nbytes if self._arena is not None else 0

    def _attach(self, agent: RunningAgent, endpoint: Endpoint, deadline: Deadline) -> None:
        """Connect to the trainer's agent as it is now, read a little, and see how that went."""
        if endpoint == self._endpoint:
            return
        self._planned, self._jobs = _NOTHING, []
        peer = agent.connect(endpoint.metadata, deadline)
        if peer != endpoint.agent:
            raise HandshakeError(f"The metadata of agent {endpoint.agent} belongs to {peer}.", backend="rdma")
        if self._endpoint is None or self._endpoint.agent != endpoint.agent:
            self._probe = self._probe or self._memory.arena(PROBE_BYTES, deadline)
            rows = np.array([[self._probe.address, endpoint.probe, PROBE_BYTES]], dtype=np.uint64)
            agent.start(agent.prepare("READ", peer, rows, self._memory.place, endpoint.place, deadline), 0, deadline)
            try:
                agent.finish(Deadline(min(deadline.remaining(), _PROBE_TIMEOUT)))
            except TransferTimeoutError:
                self._judge(agent.transport(self._memory.place))
                raise
            self._judge(agent.transport(self._memory.place))
        self._endpoint = endpoint

    def _judge(self, transport: Transport) -> None:
        """Refuse a transport that the options do not allow; doubt one that the user may not know of."""
        self._transport, self.transport = transport, f"{transport.kind} ({transport.path})"
        options, kind, place = self.config.options, transport.kind, self._memory.place
        if options.transport not in ("auto", kind):
            raise HandshakeError(
                f"UCX reads from the trainer by {transport.path} ({kind}), not over {options.transport} as this "
                f'worker\'s options demand; check what both hosts offer, or set transport = "{kind}".',
                backend="rdma",
                peer="trainer",
            )
        if kind == "tcp" and options.transport == "auto" and place.memory == VRAM and not options.allow_tcp:
            raise HandshakeError(
                "UCX finds nothing better than TCP between these GPUs. On one GPU use the ipc backend; else check "
                "NVLink and RDMA devices, or set allow_tcp = true.",
                backend="rdma",
                peer="trainer",
            )
        self._link_rate = options.link_rate or link_rate(transport)
        expected = options.transport == kind or (kind == "tcp" and options.allow_tcp)
        self._doubt = None if expected else doubt_about(transport)
        level = logging.WARNING if self._doubt else logging.INFO
        logger.log(level, "%s", self._doubt or f"rdma reads over {self.transport}")

    def _plan(
        self,
        agent: RunningAgent,
        info: RdmaUpdateInfo,
        destinations: Mapping[str, torch.Tensor] | None,
        deadline: Deadline,
    ) -> None:
        """Prepare the reads."""
        self._jobs, self._planned = [], _NOTHING
        manifest, table, endpoint = info.manifest, info.table, self._endpoint
        assert endpoint is not None
        located: Located | None = None
        if destinations is not None:
            ordered = {param.name: destinations[param.name] for param in manifest.params}
            located = self._memory.locate(manifest, ordered, deadline)
        agent.release(deadline)
        agent.attach_flags(endpoint.agent, endpoint.flags, endpoint.flags + self._rank * WORD, deadline)
        planner = Planner(agent, endpoint, self._memory.place, manifest, table, deadline)
        self._jobs = planner.direct(located, destinations or {})
        if planner.left:
            stride = -(-table.bucket_bytes // ALIGNMENT) * ALIGNMENT
            self._buffers = max(len(table.buckets), self.config.buckets)
            nbytes = stride * self._buffers
            if self._arena is None or self._arena.data.nbytes < nbytes:
                self._arena = self._memory.arena(nbytes, deadline)
            self._jobs += planner.staged(list(self._arena.data.split(stride))[: self._buffers], self._arena.address)

    def _reading(
        self, agent: RunningAgent, info: RdmaUpdateInfo, load_weights: LoadWeights, deadline: Deadline
    ) -> _Reading:
        return _Reading(
            agent, self._jobs, self._buffers, info.filled, load_weights, self._memory.settle_copies, deadline
        )


class _Reading:
    """The jobs of one update, of which some are read while one before them is loaded.

    Args:
        agent: reads.
        jobs: in order.
        buffers: how many staging buckets they share.
        filled: buckets that the trainer had filled before this update.
        load_weights: loads.
        settle_copies: waits until what ``load_weights`` has queued is done.
        deadline: of the update.

    Attributes:
        nbytes: read so far from where the weights lie.
        seconds: spent on nothing but these reads.
    """

    def __init__(
        self,
        agent: RunningAgent,
        jobs: list[Job],
        buffers: int,
        filled: int,
        load_weights: LoadWeights,
        settle_copies: Callable[[], None],
        deadline: Deadline,
    ) -> None:
        self._agent, self._load_weights, self._deadline = agent, load_weights, deadline
        self._waiting, self._under_way = deque(jobs), deque[Job]()
        self.nbytes, self.seconds = 0, 0.0
        self._buffers, self._filled, self._settle_copies = buffers, filled, settle_copies

    def start(self) -> bool:
        """Begin, and say whether the worker's tensors are where they were: the first are read meanwhile."""
        for number, job in enumerate(list(self._waiting)):
            if not job.stands():
                return False
            if number < _DEPTH and job.targets and number == len(self._under_way):
                self._start()
        return True

    def abandon(self) -> None:
        """Wait for what was begun; nothing of it is loaded."""
        for job in self._under_way:
            self._finish(job)

    def run(self) -> None:
        """Read and load everything."""
        self._start_all()
        while self._under_way:
            job = self._under_way[0]
            self._finish(job)
            if job.targets:
                self._under_way.popleft()
            self._start_all()
            job.load(self._load_weights)
            if not job.targets:
                self._settle_copies()
                self._under_way.popleft()
                self._start_all()

    def _start_all(self) -> None:
        """Begin all reads that may be under way now."""
        while self._waiting and len(self._under_way) < _DEPTH:
            staged = sum(job.takes_a_bucket for job in self._under_way)
            if self._waiting[0].takes_a_bucket and staged >= self._buffers:
                return  # its bucket holds what is not loaded yet
            self._start()

    def _start(self) -> None:
        job = self._waiting.popleft()
        self._under_way.append(job)
        if job.targets:
            self._load_weights.write_in_place()  # type: ignore[attr-defined]  # whoever has destinations has this too
        if job.handle is not None:
            with self._timed(job):
                self._agent.start(job.handle, self._filled + job.bucket if job.bucket else 0, self._deadline)

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
