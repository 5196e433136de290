"""The trainer's side: lets its agent at the weights, and fills buckets with those that the agent cannot reach."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import ALIGNMENT, Manifest, Packer, plan_buckets, staged_tensors
from weight_transfer.engine import TrainerWeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, PeerLostError, TransferError
from weight_transfer_rdma.info import PROBE_BYTES, WORD, Endpoint, RdmaInitInfo, RdmaUpdateInfo, Table
from weight_transfer_rdma.memory import Arena, Located, RunningAgent, memory_for
from weight_transfer_rdma.nixl import VRAM
from weight_transfer_rdma.plan import Integers

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, ParallelConfig, WeightSource, WeightTransferConfig

_FLAGS_BYTES = 64 * 1024
_PARTS, _LEAST = 4, 2**20  # of one bucket of the configuration, and the bytes that each has at least
_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-4  # seconds between two looks at the workers' counters


class RdmaTrainerEngine(TrainerWeightTransferEngine[RdmaInitInfo, RdmaUpdateInfo]):
    """Exposes the trainer's weights to the workers' reads.

    What the agent can reach is read in place while `send_weights` has nothing to do. The rest (gathered, temporary or
    not contiguous tensors) goes through a ring of buckets: the trainer counts the buckets that it fills, the workers
    read the counter, then the bucket, and write how far they are.
    """

    init_info_cls = RdmaInitInfo
    update_info_cls = RdmaUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._memory = memory_for(parallel_config.device, config.options)
        self._ranks: dict[str, range] = {}
        self._open: _Open | None = None
        self._filled = 0
        self._updating = False
        self._aborted = threading.Event()

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        self._aborted.clear()
        ranks = {slot.peer: range(slot.rank_offset, slot.rank_offset + slot.count) for slot in slots}
        if max(each.stop for each in ranks.values()) * WORD > _FLAGS_BYTES:
            raise HandshakeError(f"rdma serves at most {_FLAGS_BYTES // WORD - 1} workers from one trainer.")
        opened = self._opened(deadline)
        self._ranks |= ranks
        for each in ranks.values():
            opened.counters[each.start : each.stop] = self._filled
        return [{"endpoint": opened.endpoint} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        """Wait for nothing: a worker that has joined says so over the control channel."""

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        self._updating = True
        opened = self._opened(deadline)
        self._memory.settle()
        located = self._memory.locate(manifest, source.resident(), deadline)
        if opened.table is None or located is not opened.located or opened.manifest is not manifest:
            self._describe(opened, located, manifest, deadline)
        return {"endpoint": opened.endpoint, "table": opened.table, "filled": self._filled}

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        opened = self._open
        assert opened is not None
        if opened.packer is not None:
            self._fill(opened, opened.packer, source, deadline, progress)

    def release_source(self) -> None:
        self._updating = False

    def abort_update(self) -> None:
        """Stop the agent: whoever reads finds it gone. The next join starts another one."""
        self._aborted.set()
        opened = self._open
        if self._updating and opened is not None:
            opened.agent.kill()

    def lose_worker(self, peer: str) -> None:
        self._ranks.pop(peer, None)

    def shutdown(self) -> None:
        self._close_agent()
        self._memory.close()

    @property
    def extra_memory(self) -> int:
        return self._open.ring.data.nbytes if self._open is not None and self._open.ring is not None else 0

    def _opened(self, deadline: Deadline) -> _Open:
        """Return the agent and what belongs to it; make them anew if the agent has ended."""
        if self._open is not None and not self._open.agent.alive:
            self._close_agent()
        if self._open is None:
            agent = self._memory.start_agent(f"trainer-{secrets.token_hex(8)}", "a worker", False, deadline)
            try:
                flags = self._memory.words(_FLAGS_BYTES, deadline)
                probe = self._memory.arena(PROBE_BYTES, deadline)
                endpoint = Endpoint(
                    agent=agent.name,
                    metadata=agent.metadata(deadline),
                    flags=flags.address,
                    probe=probe.address,
                    memory=self._memory.place.memory,
                    device=self._memory.place.device,
                )
            except BaseException:
                agent.close()
                raise
            self._open = _Open(agent, endpoint, flags.data.view(torch.int64).numpy(), flags, probe)
            self._open.counters[:] = self._filled
        return self._open

    def _close_agent(self) -> None:
        if self._open is not None:
            self._open.agent.close()
            self._open = None

    def _describe(self, opened: _Open, located: Located, manifest: Manifest, deadline: Deadline) -> None:
        staged = [
            param
            for param, address in zip(manifest.params, located.addresses.tolist(), strict=True)
            if address < 0 and param.nbytes
        ]
        bucket_bytes, count = self._cut()
        stride = -(-bucket_bytes // ALIGNMENT) * ALIGNMENT
        if staged and opened.ring is None:
            opened.ring = self._memory.arena(stride * count, deadline)
        buckets: tuple[int, ...] = ()
        opened.packer = None
        if opened.ring is not None and staged:
            buffers = opened.ring.data.split(stride)
            opened.packer = Packer(plan_buckets(staged, bucket_bytes), buffers)
            buckets = tuple(opened.ring.address + index * stride for index in range(len(buffers)))
        opened.table = Table(
            addresses=tuple(located.addresses.tolist()),
            region_addresses=tuple(located.regions.addresses.tolist()),
            region_sizes=tuple(located.regions.sizes.tolist()),
            buckets=buckets,
            bucket_bytes=bucket_bytes,
        )
        metadata = opened.agent.metadata(deadline)
        if metadata != opened.endpoint.metadata:
            opened.endpoint = attrs.evolve(opened.endpoint, metadata=metadata)
        opened.located, opened.manifest = located, manifest

    def _cut(self) -> tuple[int, int]:
        """Return size and number of the ring's buckets.

        Between GPUs a bucket is read so fast that what both sides tell each other takes as long. So the same memory is
        cut finer there: the trainer is ahead by several buckets, and workers learn of several at once.
        """
        parts = _PARTS if self._memory.place.memory == VRAM and self.config.bucket_bytes >= _PARTS * _LEAST else 1
        return self.config.bucket_bytes // parts // ALIGNMENT * ALIGNMENT, self.config.buckets * parts

    def _fill(
        self,
        opened: _Open,
        packer: Packer,
        source: WeightSource,
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Put the staged tensors into the ring; returns when all workers have read them."""
        assert opened.table is not None
        tensors = staged_tensors(source, packer.plan.params)
        packing = packer.packing(tensors, kept=not source.reuses_memory)
        before = self._filled
        for index in range(len(packer.plan.buckets)):
            self._await(before + index + 1 - len(opened.table.buckets), opened, deadline)
            nbytes = next(packing)
            self._memory.settle_copies()
            self._filled += 1
            opened.counters[0] = self._filled
            progress(nbytes)
        self._await(self._filled, opened, deadline)

    def _await(self, bucket: int, opened: _Open, deadline: Deadline) -> None:
        """Wait until every worker has read that many buckets."""
        pause = _FIRST_PAUSE
        while waiting := list(self._ranks.values()):
            if all((opened.counters[ranks.start : ranks.stop] >= bucket).all() for ranks in waiting):
                return
            deadline.check("waiting for the workers to read a bucket", backend="rdma", phase="update")
            if self._aborted.wait(pause):
                raise TransferError("The update was aborted.", backend="rdma", phase="update")
            pause = min(2 * pause, _LONGEST_PAUSE)
            if not opened.agent.alive:
                raise PeerLostError("The trainer's RDMA agent ended.", backend="rdma", phase="update", peer="trainer")
        raise PeerLostError("No worker is left.", backend="rdma", phase="update")


@attrs.define(eq=False)
class _Open:
    """A running agent and what it gives access to.

    Attributes:
        counters: at index 0, the buckets that were filled; at a worker's rank, those that it has read.
    """

    agent: RunningAgent
    endpoint: Endpoint
    counters: Integers
    flags: Arena
    probe: Arena
    ring: Arena | None = None
    table: Table | None = None
    packer: Packer | None = None
    located: Located | None = None
    manifest: Manifest | None = None
