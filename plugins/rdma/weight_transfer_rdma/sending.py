"""The trainer's side: lets its agent at the weights, and fills buckets with those that the agent cannot reach."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import (
    ALIGNMENT,
    Manifest,
    OutgoingRegions,
    Packer,
    plan_buckets,
    staged_tensors,
    unstructure,
)
from weight_transfer.engine import TrainerWeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, PeerLostError, TransferError
from weight_transfer_rdma.giving import MOST, Rings, Shards, as_params, ring_sizes
from weight_transfer_rdma.info import (
    FLAGS_BYTES,
    MOST_WORKERS,
    PROBE_BYTES,
    Endpoint,
    RdmaInitInfo,
    RdmaUpdateInfo,
    Table,
    ring_counter,
)
from weight_transfer_rdma.memory import Arena, Located, RunningAgent, memory_for
from weight_transfer_rdma.nixl import DRAM, REGIONS, VRAM
from weight_transfer_rdma.plan import Integers

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, ParallelConfig, WeightSource, WeightTransferConfig

_PARTS, _LEAST = 4, 2**20  # of one bucket of the configuration, and the bytes that each has at least
_FIRST_PAUSE = 2e-5  # seconds between two looks at the workers' counters, at first
_LONGEST_PAUSE = {DRAM: 1e-3, VRAM: 1e-4}  # and later, by kind of memory


class RdmaTrainerEngine(TrainerWeightTransferEngine[RdmaInitInfo, RdmaUpdateInfo]):
    """Exposes the trainer's weights to the workers' reads.

    What the agent can reach is read in place while `send_weights` has nothing to do. The rest (gathered, temporary or
    not contiguous tensors) goes through a ring of buckets: the trainer counts the buckets that it fills, the workers
    read the counter, then the bucket, and write how far they are. By region each worker has a ring of its own, for
    what is cut too fine to be read where it lies.
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
        self._shards: tuple[OutgoingRegions, Manifest, dict[str, torch.Tensor]] | None = None

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        endpoint = self._open_for(slots, deadline)
        return [{"endpoint": endpoint} for _ in slots]

    def open_rank(self, first: Mapping[str, Any], slots: Sequence[WorkerSlot], deadline: Deadline) -> dict[str, Any]:
        return {"endpoint": unstructure(self._open_for(slots, deadline))}

    def _open_for(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> Endpoint:
        self._aborted.clear()
        ranks = {slot.peer: range(slot.rank_offset, slot.rank_offset + slot.count) for slot in slots}
        if max(each.stop for each in ranks.values()) - 1 > MOST_WORKERS:
            raise HandshakeError(f"rdma serves at most {MOST_WORKERS} workers from one trainer.")
        opened = self._opened(deadline)
        self._ranks |= ranks
        for each in ranks.values():
            opened.counters[each.start : each.stop] = self._filled
        opened.begin_turn()
        return opened.endpoint

    def join_workers(self, deadline: Deadline) -> None:
        """Wait for nothing: a worker that has joined says so over the control channel."""

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        self._updating = True
        opened = self._opened(deadline)
        self._memory.settle()
        resident = source.resident()
        if opened.resident is not resident or opened.manifest is not manifest or self._memory.parted:
            located = self._memory.locate(manifest, resident, deadline)
            if opened.table is None or located is not opened.located or opened.manifest is not manifest:
                self._describe(opened, located, manifest, deadline)
            opened.resident = None if self._memory.moved else resident
        return {"endpoint": opened.endpoint, "table": opened.table, "filled": self._filled}

    @property
    def tolerates_moves(self) -> bool:
        """Whether workers alone read the weights: what is registered stays registered until it is located anew."""
        return self._open is not None and self._open.packer is None

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        opened = self._open
        assert opened is not None
        if opened.packer is not None:
            self._fill(opened, opened.packer, source, deadline, progress)

    def share_regions(self, outgoing: OutgoingRegions, deadline: Deadline) -> dict[str, Any]:
        self._updating = True
        opened = self._opened(deadline)
        self._memory.settle()
        if self._shards is None or self._shards[0] is not outgoing:
            self._shards = outgoing, *as_params(outgoing.tensors)
        rings = opened.rings
        if rings is not None and opened.standing is outgoing and not self._memory.parted:
            return rings.share(opened.endpoint, opened.turn)
        located = self._memory.locate(*self._shards[1:], deadline, REGIONS)
        opened.standing = None if self._memory.moved else outgoing
        if rings is None or rings.shards.outgoing is not outgoing or rings.shards.located is not located:
            rings = opened.rings = self._make_rings(opened, Shards(outgoing, located, self._memory), deadline)
            self._renew_metadata(opened, deadline)
        return rings.share(opened.endpoint, opened.turn)

    def send_regions(self, outgoing: OutgoingRegions, deadline: Deadline, progress: Callable[[int], None]) -> None:
        opened = self._open
        assert opened is not None
        assert opened.rings is not None
        if not len(opened.rings):
            return
        pauses = _Pauses(self._memory.place.memory)

        def packed(nbytes: int) -> None:
            nonlocal pauses
            pauses = _Pauses(self._memory.place.memory)
            progress(nbytes)

        try:
            opened.rings.fill(
                lambda peer: peer not in self._ranks,
                self._memory.settle_copies,
                lambda: self._pause(pauses, opened, deadline),
                packed,
            )
            if not self._ranks:
                raise PeerLostError("No worker is left.", backend="rdma", phase="update")
        except BaseException:
            opened.begin_turn()
            raise

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
        if self._open is None:
            return 0
        arenas = {self._open.ring, self._open.rings.arena if self._open.rings is not None else None} - {None}
        return sum(arena.data.nbytes for arena in arenas if arena is not None)

    def _opened(self, deadline: Deadline) -> _Open:
        """Return the agent and what belongs to it; make them anew if the agent has ended."""
        if self._open is not None and not self._open.agent.alive:
            self._close_agent()
        if self._open is None:
            agent = self._memory.start_agent(f"trainer-{secrets.token_hex(8)}", "a worker", False, deadline)
            try:
                flags = self._memory.words(FLAGS_BYTES, deadline)
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
            self._open.counters[: ring_counter(0)] = self._filled
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
        if staged:
            self._stage(opened, stride * count, deadline)
        buckets: tuple[int, ...] = ()
        opened.packer = None
        if opened.ring is not None and staged:
            buffers = opened.ring.data[: stride * count].split(stride)
            opened.packer = Packer(plan_buckets(staged, bucket_bytes), buffers)
            buckets = tuple(opened.ring.address + index * stride for index in range(len(buffers)))
        opened.table = Table(
            addresses=tuple(located.addresses.tolist()),
            region_addresses=tuple(located.regions.addresses.tolist()),
            region_sizes=tuple(located.regions.sizes.tolist()),
            buckets=buckets,
            bucket_bytes=bucket_bytes,
        )
        self._renew_metadata(opened, deadline)
        opened.located, opened.manifest = located, manifest

    def _make_rings(self, opened: _Open, shards: Shards, deadline: Deadline) -> Rings:
        if opened.rings is not None and opened.rings.arena not in (None, opened.ring):
            self._memory.free(opened.rings.arena, deadline)
        opened.rings = None
        if not shards.packed:
            return Rings(shards, None, (0, 0), opened.counters)
        bucket_bytes, count = self._cut()
        sizes = ring_sizes(shards.packed, bucket_bytes * count, MOST[self._memory.place.memory])
        nbytes = len(shards.packed) * sizes[0] * sizes[1]
        if opened.ring is not None and opened.packer is not None and opened.ring.data.nbytes < nbytes:
            arena = self._memory.arena(nbytes, deadline)  # so many workers that the other one is too small
        else:
            arena = self._stage(opened, nbytes, deadline)
        return Rings(shards, arena, sizes, opened.counters)

    def _stage(self, opened: _Open, nbytes: int, deadline: Deadline) -> Arena:
        """Return staging memory of at least ``nbytes``, for what goes whole, and then for what goes by region."""
        if opened.ring is not None and opened.ring.data.nbytes < nbytes:
            self._memory.free(opened.ring, deadline)
            opened.ring = opened.rings = None
        if opened.ring is None:
            opened.ring = self._memory.arena(nbytes, deadline)
        return opened.ring

    def _renew_metadata(self, opened: _Open, deadline: Deadline) -> None:
        metadata = opened.agent.metadata(deadline)
        if metadata != opened.endpoint.metadata:
            opened.endpoint = attrs.evolve(opened.endpoint, metadata=metadata)

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
        pauses = _Pauses(self._memory.place.memory)
        while waiting := list(self._ranks.values()):
            if all((opened.counters[ranks.start : ranks.stop] >= bucket).all() for ranks in waiting):
                return
            self._pause(pauses, opened, deadline)
        raise PeerLostError("No worker is left.", backend="rdma", phase="update")

    def _pause(self, pauses: _Pauses, opened: _Open, deadline: Deadline) -> None:
        """Wait a little for the workers' counters; raise if that has become vain."""
        deadline.check("waiting for the workers to read a bucket", backend="rdma", phase="update")
        if self._aborted.wait(next(pauses)):
            raise TransferError("The update was aborted.", backend="rdma", phase="update")
        if not opened.agent.alive:
            raise PeerLostError("The trainer's RDMA agent ended.", backend="rdma", phase="update", peer="trainer")


class _Pauses:
    """Seconds between looks at the workers' counters: longer and longer ones."""

    def __init__(self, memory: str) -> None:
        self._next, self._longest = _FIRST_PAUSE, _LONGEST_PAUSE[memory]

    def __next__(self) -> float:
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause


@attrs.define(eq=False)
class _Open:
    """A running agent and what it gives access to.

    Attributes:
        counters: at index 0, the buckets that were filled; at a worker's rank, those that it has read; at
            `ring_counter`, those of its own ring.
        ring: staging memory.
        rings: what is given by region.
        turn: see `Share`.
        resident: what `table` was made for, if that moved nothing; `standing`, the same for ``rings``.
    """

    agent: RunningAgent
    endpoint: Endpoint
    counters: Integers
    flags: Arena
    probe: Arena
    ring: Arena | None = None
    rings: Rings | None = None
    turn: int = 0
    table: Table | None = None
    packer: Packer | None = None
    located: Located | None = None
    manifest: Manifest | None = None
    resident: Mapping[str, torch.Tensor] | None = None
    standing: OutgoingRegions | None = None

    def begin_turn(self) -> None:
        """Count the buckets of all workers' rings anew."""
        self.turn += 1
        self.counters[ring_counter(0) :] = 0
