"""A worker's side: reads the trainer's memory, into its own parameters where its loader only copies."""

from __future__ import annotations

import logging
import operator
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from weight_transfer.buckets import ALIGNMENT, Unpacker, plan_buckets
from weight_transfer.deadline import Deadline
from weight_transfer.engine import LoadWeights, WeightTransferEngine
from weight_transfer.errors import HandshakeError, ManifestMismatchError, TransferTimeoutError
from weight_transfer.loading import destinations_of
from weight_transfer_rdma.info import PROBE_BYTES, WORD, Endpoint, RdmaInitInfo, RdmaUpdateInfo, Table
from weight_transfer_rdma.link import doubt_about, link_rate, slow_link
from weight_transfer_rdma.memory import memory_for
from weight_transfer_rdma.nixl import VRAM, Place, Transport
from weight_transfer_rdma.plan import Regions, merge

if TYPE_CHECKING:
    from weight_transfer.config import ParallelConfig, WeightTransferConfig
    from weight_transfer.manifest import Manifest
    from weight_transfer_rdma.memory import Arena, Located, RunningAgent

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT = 10.0  # seconds for the first, small read; a GPU's memory over TCP may never arrive
_CHUNK = 2**30  # bytes of one read into the worker's own parameters
_NOTHING = (object(),)  # is planned for nothing
_DEPTH = 4  # reads under way; fewer if the staging buckets are fewer


@attrs.frozen(eq=False)
class _Job:
    """One read, and what to load when it is done.

    Attributes:
        handle: the prepared read; None if there is nothing to read.
        bucket: which bucket of the update the trainer must have filled, counted from 1; 0 for a read of the weights
            where they lie.
        nbytes: to be read.
        load: called after the read.
        targets: the worker's own tensors that it writes into, and where they were when it was prepared.
    """

    handle: int | None
    bucket: int
    nbytes: int
    load: Callable[[LoadWeights], None]
    targets: Sequence[tuple[torch.Tensor, int]] = ()

    def stands(self) -> bool:
        """Whether its targets still are where they were."""
        return all(tensor.data_ptr() == address and tensor.is_contiguous() for tensor, address in self.targets)


class RdmaWorkerEngine(WeightTransferEngine[RdmaInitInfo, RdmaUpdateInfo]):
    """Reads the trainer's weights."""

    init_info_cls = RdmaInitInfo
    update_info_cls = RdmaUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._transport = Transport("unknown", "not joined")
        self._link_rate: float | None = None
        self._doubts: tuple[str, ...] = ()
        self._workers = 1
        self._memory = memory_for(parallel_config.device, config.options)
        self._agent: RunningAgent | None = None
        self._rank = 0
        self._probe: Arena | None = None
        self._arena: Arena | None = None
        self._buffers = 0
        self._endpoint: Endpoint | None = None
        self._planned: tuple[object, ...] = _NOTHING
        self._jobs: list[_Job] = []

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
            if not all(map(operator.is_, planned, self._planned)) or not reading.start():
                reading.abandon()
                self._plan(agent, update_info, destinations, deadline)
                self._planned = planned
                reading = self._reading(agent, update_info, load_weights, deadline)
            reading.run()
            slow = slow_link(reading.nbytes, reading.seconds, self._transport, self._link_rate, self._workers)
            self.warnings = (*self._doubts, slow) if slow else self._doubts
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
        doubt = "" if options.allow_tcp or options.transport == kind else doubt_about(transport)
        self._doubts = (doubt,) if doubt else ()
        logger.log(logging.WARNING if doubt else logging.INFO, "%s", doubt or f"rdma reads over {self.transport}")

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
        planner = _Planner(agent, endpoint, self._memory.place, manifest, table, deadline)
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
        nbytes: read so far from where the weights lie; buckets do not count, for which the trainer may be waited for.
        seconds: spent on nothing but these.
    """

    def __init__(
        self,
        agent: RunningAgent,
        jobs: list[_Job],
        buffers: int,
        filled: int,
        load_weights: LoadWeights,
        settle_copies: Callable[[], None],
        deadline: Deadline,
    ) -> None:
        self._agent, self._load_weights, self._deadline = agent, load_weights, deadline
        self._waiting, self._under_way = deque(jobs), deque[_Job]()
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
            staged = sum(not job.targets for job in self._under_way)
            if not self._waiting[0].targets and staged >= self._buffers:
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

    def _finish(self, job: _Job) -> None:
        if job.handle is not None:
            with self._timed(job):
                self._agent.finish(self._deadline)
            self.nbytes += 0 if job.bucket else job.nbytes

    @contextmanager
    def _timed(self, job: _Job) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.seconds += 0 if job.bucket else time.perf_counter() - since


class _Planner:
    """Turns a manifest and both sides' addresses into jobs."""

    def __init__(
        self,
        agent: RunningAgent,
        endpoint: Endpoint,
        place: Place,
        manifest: Manifest,
        table: Table,
        deadline: Deadline,
    ) -> None:
        self._agent, self._endpoint, self._place, self._deadline = agent, endpoint, place, deadline
        self._table = table
        self._params = manifest.params
        self._remote = np.array(table.addresses, dtype=np.int64)
        self._sizes = np.array([param.nbytes for param in manifest.params], dtype=np.int64)
        if len(self._remote) != len(self._sizes) or len(table.region_addresses) != len(table.region_sizes):
            raise ManifestMismatchError(
                "The trainer's table of addresses and its manifest differ in length.", backend="rdma"
            )
        regions = Regions.of(list(zip(table.region_addresses, table.region_sizes, strict=True)))
        reachable = (self._remote >= 0) & (self._sizes > 0)
        self._regions = np.full(len(self._sizes), -1, dtype=np.int64)
        self._regions[reachable] = regions.index(self._remote[reachable], self._sizes[reachable])
        self.left = set(range(len(self._sizes)))

    def direct(self, located: Located | None, destinations: Mapping[str, torch.Tensor]) -> list[_Job]:
        """Read into the worker's own parameters what both agents reach."""
        if located is None:
            return []
        at_home = np.zeros(len(self._sizes), dtype=np.int64)
        possible = (self._remote >= 0) & (located.addresses >= 0) & (self._sizes > 0)
        at_home[possible] = located.regions.index(located.addresses[possible], self._sizes[possible])
        order = np.flatnonzero(possible)
        order = order[np.argsort(located.addresses[order], kind="stable")]
        jobs = []
        for chunk in np.split(order, _cuts(self._sizes[order], _CHUNK)):
            if len(chunk):
                rows = merge(
                    located.addresses[chunk],
                    self._remote[chunk],
                    self._sizes[chunk],
                    at_home[chunk],
                    self._regions[chunk],
                    located.padded[chunk],
                )
                names = [self._params[index].name for index in chunk.tolist()]
                weights = [(name, destinations[name]) for name in names]
                targets = [(tensor, tensor.data_ptr()) for _, tensor in weights]
                nbytes = int(self._sizes[chunk].sum())
                jobs.append(_Job(self._prepare(rows), 0, nbytes, _loading(weights), targets))
        empty = [param.name for param in self._params if not param.nbytes]
        if empty:
            jobs.append(_Job(None, 0, 0, _loading([(name, destinations[name]) for name in empty])))
        self.left -= {*order.tolist(), *np.flatnonzero(self._sizes == 0).tolist()}
        return jobs

    def staged(self, buffers: list[torch.Tensor], address: int) -> list[_Job]:
        """Read the rest into staging buckets.

        Args:
            buffers: the buckets, uint8, one after another.
            address: of the first one in the agent.
        """
        stride = buffers[0].nbytes
        addresses = [address + index * stride for index in range(len(buffers))]
        pulled = self._pulled(buffers, addresses)
        turn = len(pulled) % len(buffers)  # the next bucket is read while the last one of these is loaded
        return pulled + self._filled(buffers[turn:] + buffers[:turn], addresses[turn:] + addresses[:turn])

    def _pulled(self, buffers: list[torch.Tensor], addresses: list[int]) -> list[_Job]:
        """Read from the trainer's own parameters what its agent reaches."""
        indices = [index for index in sorted(self.left) if self._remote[index] >= 0 or not self._sizes[index]]
        plan = plan_buckets([self._params[index] for index in indices], self._table.bucket_bytes)
        unpacker = Unpacker(plan, buffers)
        jobs = []
        for number, slots in enumerate(plan.buckets):
            used = [slot for slot in slots if slot.nbytes]
            handle = None
            if used:
                params = np.array([indices[slot.param] for slot in used], dtype=np.int64)
                rows = merge(
                    addresses[number % len(buffers)] + np.array([slot.offset for slot in used], dtype=np.int64),
                    self._remote[params] + np.array([slot.start for slot in used], dtype=np.int64),
                    np.array([slot.nbytes for slot in used], dtype=np.int64),
                    np.zeros(len(used), dtype=np.int64),
                    self._regions[params],
                    np.ones(len(used), dtype=bool),
                )
                handle = self._prepare(rows)
            jobs.append(_Job(handle, 0, sum(slot.nbytes for slot in used), _unpacking(unpacker, number)))
        self.left -= set(indices)
        return jobs

    def _filled(self, buffers: list[torch.Tensor], addresses: list[int]) -> list[_Job]:
        """Read the buckets that the trainer fills, one after another."""
        plan = plan_buckets([self._params[index] for index in sorted(self.left)], self._table.bucket_bytes)
        if plan.params and not self._table.buckets:
            raise ManifestMismatchError("The trainer's table has weights without an address.", backend="rdma")
        unpacker = Unpacker(plan, buffers)
        jobs = []
        for number, slots in enumerate(plan.buckets):
            theirs = self._table.buckets[number % len(self._table.buckets)]
            row = np.array([[addresses[number % len(buffers)], theirs, slots[-1].offset + slots[-1].nbytes]], np.uint64)
            jobs.append(_Job(self._prepare(row), number + 1, int(row[0, 2]), _unpacking(unpacker, number)))
        self.left.clear()
        return jobs

    def _prepare(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> int:
        endpoint = self._endpoint
        return self._agent.prepare("READ", endpoint.agent, rows, self._place, endpoint.place, self._deadline)


def _cuts(
    sizes: np.ndarray[tuple[int, ...], np.dtype[np.int64]], limit: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return where to cut a list so that no part is much larger than ``limit``."""
    return np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1


def _loading(weights: list[tuple[str, torch.Tensor]]) -> Callable[[LoadWeights], None]:
    return lambda load_weights: load_weights(weights)


def _unpacking(unpacker: Unpacker, number: int) -> Callable[[LoadWeights], None]:
    return lambda load_weights: unpacker.load(number, load_weights)
