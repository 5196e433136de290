"""A worker's side: reads the trainer's memory, into its own parameters where its loader only copies."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.authoring import ALIGNMENT, Deadline, destinations_of
from weight_transfer.engine import LoadWeights, WeightTransferEngine
from weight_transfer.errors import TransferError
from weight_transfer_rdma.incoming import RegionReads
from weight_transfer_rdma.info import WORD, Endpoint, RdmaInitInfo, RdmaUpdateInfo
from weight_transfer_rdma.jobs import Planner
from weight_transfer_rdma.link import slow_link
from weight_transfer_rdma.memory import memory_for
from weight_transfer_rdma.nixl import REGIONS, WHOLE
from weight_transfer_rdma.peers import Peers
from weight_transfer_rdma.reading import DEPTH, Job, Reading

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import IncomingRegions, ParallelConfig, WeightTransferConfig
    from weight_transfer_rdma.memory import Arena, Located, RunningAgent

_NOTHING = (object(),)  # is planned for nothing


class RdmaWorkerEngine(WeightTransferEngine[RdmaInitInfo, RdmaUpdateInfo]):
    """Reads the trainer's weights."""

    init_info_cls = RdmaInitInfo
    update_info_cls = RdmaUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._workers = 1
        self._memory = memory_for(parallel_config.device, config.options)
        self._agent: RunningAgent | None = None
        self._rank = 0
        self._arena: Arena | None = None
        self._buffers = 0
        self._peers = Peers(config.options, self._memory, 1)
        self._planned: tuple[object, ...] = _NOTHING
        self._jobs: list[Job] = []
        self._regions = RegionReads(config, self._memory, 0)
        self._warned: tuple[RdmaUpdateInfo | None, tuple[str, ...]] = None, ()

    def init_transfer_engine(self, init_info: RdmaInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        self._rank = init_info.rank_offset + self.parallel_config.rank
        self._workers = init_info.world_size - 1
        self._agent = self._memory.start_agent(f"worker-{secrets.token_hex(8)}", "trainer", True, deadline)
        ranks = init_info.of_ranks()
        self._peers = Peers(self.config.options, self._memory, len(ranks))
        self._regions = RegionReads(self.config, self._memory, self._rank - 1)
        for rank, info in enumerate(ranks):
            self._attach(self._agent, rank, info.endpoint, deadline)

    def receive_weights(self, update_info: RdmaUpdateInfo, load_weights: LoadWeights) -> None:
        agent = self._agent
        assert agent is not None
        deadline = Deadline(update_info.timeout)
        try:
            self._memory.settle()
            self._attach(agent, 0, update_info.endpoint, deadline)
            destinations = destinations_of(load_weights)
            planned = update_info.manifest, update_info.table, destinations
            if self._memory.parted or not all(map(operator.is_, planned, self._planned)):
                self._plan(agent, update_info, destinations, deadline)
                self._planned = _NOTHING if self._memory.moved else planned
            reading = self._reading(agent, update_info, load_weights, deadline)
            reading.run()
            if self._memory.parted:  # what was read after a fork is not in this process's memory
                raise TransferError("This process forked during the update; send it again.", backend="rdma")
            self._warn(update_info, reading)
        except BaseException:
            agent.kill()  # what was under way writes nothing any more
            raise

    def receive_regions(self, update_info: RdmaUpdateInfo, incoming: IncomingRegions) -> None:
        agent = self._agent
        assert agent is not None
        deadline = Deadline(update_info.timeout)
        try:
            self._memory.settle()
            shares = self._regions.shares(update_info.shares, incoming)
            for rank in np.unique(incoming.pieces.rank).tolist():
                self._attach(agent, rank, shares[rank].endpoint, deadline)
            if self._memory.parted or not self._regions.fits(incoming):
                self._regions.plan(
                    agent, incoming, lambda nbytes: self._stage(agent, nbytes, deadline, REGIONS), deadline
                )
            reading = self._regions.reading(agent, incoming, deadline)
            reading.run()
            self._regions.end()
            if self._memory.parted:
                raise TransferError("This process forked during the update; send it again.", backend="rdma")
            self._warn(update_info, reading)
        except BaseException:
            agent.kill()
            raise

    def abort_update(self) -> None:
        if self._agent is not None:
            self._agent.kill()

    def shutdown(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._forget()
        self._arena = None
        self._peers = Peers(self.config.options, self._memory, 1)
        self._memory.close()

    @property
    def extra_memory(self) -> int:
        return self._arena.data.nbytes if self._arena is not None else 0

    def _attach(self, agent: RunningAgent, rank: int, endpoint: Endpoint, deadline: Deadline) -> None:
        """Connect to the agent of a trainer rank as it is now."""
        if self._peers.attach(agent, rank, endpoint, deadline):
            self._forget()
            self.transport = ", ".join(f"{each.kind} ({each.path})" for each in self._peers.transports)

    def _forget(self) -> None:
        """Drop what was planned."""
        self._jobs, self._planned = [], _NOTHING
        self._regions.forget()

    def _warn(self, info: RdmaUpdateInfo, reading: Reading) -> None:
        """Say what is amiss with an update, of which a part may have been read before."""
        transport, rate = self._peers.link
        slow = slow_link(reading.nbytes, reading.seconds, transport, rate, self._workers)
        before = self._warned[1] if self._warned[0] is info else ()
        self.warnings = tuple(dict.fromkeys(filter(None, (*before, *self._peers.doubts, slow))))
        self._warned = info, self.warnings

    def _stage(self, agent: RunningAgent, nbytes: int, deadline: Deadline, plan: str = WHOLE) -> Arena:
        """Return staging memory of at least ``nbytes``, for what comes whole, and then for what comes by region.

        What the other plan has prepared is void if there was less; ``plan`` itself has prepared nothing with it yet.
        """
        if self._arena is not None and self._arena.data.nbytes < nbytes:
            if plan == WHOLE:
                self._regions.forget()
                agent.release(deadline, REGIONS)
            else:
                self._jobs, self._planned = [], _NOTHING
                agent.release(deadline, WHOLE)
            self._memory.free(self._arena, deadline)
            self._arena = None
        if self._arena is None:
            self._arena = self._memory.arena(nbytes, deadline)
        return self._arena

    def _plan(
        self,
        agent: RunningAgent,
        info: RdmaUpdateInfo,
        destinations: Mapping[str, torch.Tensor] | None,
        deadline: Deadline,
    ) -> None:
        """Prepare the reads."""
        self._jobs, self._planned = [], _NOTHING
        manifest, table, endpoint = info.manifest, info.table, info.endpoint
        located: Located | None = None
        if destinations is not None:
            ordered = {param.name: destinations[param.name] for param in manifest.params}
            located = self._memory.locate(manifest, ordered, deadline)
        agent.release(deadline)
        agent.attach_flags(endpoint.agent, endpoint.flags, endpoint.flags + self._rank * WORD, deadline)
        planner = Planner(agent, endpoint, self._memory.place, manifest, table, deadline)
        self._jobs = planner.direct(located)
        if planner.left:
            stride = -(-table.bucket_bytes // ALIGNMENT) * ALIGNMENT
            self._buffers = max(len(table.buckets), self.config.buckets)
            arena = self._stage(agent, stride * self._buffers, deadline)
            self._jobs += planner.staged(list(arena.data.split(stride))[: self._buffers], arena.address)

    def _reading(
        self, agent: RunningAgent, info: RdmaUpdateInfo, load_weights: LoadWeights, deadline: Deadline
    ) -> Reading:
        settle, depth = self._memory.settle_copies, DEPTH[self._memory.place.memory]
        return Reading(agent, self._jobs, self._buffers, {0: info.filled}, load_weights, settle, deadline, depth)
