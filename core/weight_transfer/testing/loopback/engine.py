"""Both engines of the loopback backend.

The trainer packs its weights into a ring of buckets; each worker loads a bucket and releases it; a bucket is filled
again when all workers have released it.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, PeerLostError
from weight_transfer.model.info import WeightTransferInitInfo, WeightTransferUpdateInfo
from weight_transfer.plan.buckets import BucketPlan, Packer, Unpacker, plan_buckets
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.source import WeightSource


@attrs.frozen(kw_only=True)
class LoopbackInitInfo(WeightTransferInitInfo):
    """``endpoint``: the trainer's endpoint in this process."""

    endpoint: str


@attrs.frozen(kw_only=True)
class LoopbackUpdateInfo(WeightTransferUpdateInfo):
    """``serial``: counts the trainer's updates, so that a worker never takes a bucket of another one."""

    serial: int


class Ring:
    """The shared state of a trainer and its workers: buffers, and how far everybody is with them."""

    def __init__(self, ranks: range, bucket_bytes: int, buckets: int) -> None:
        self.buffers = [torch.empty(bucket_bytes, dtype=torch.uint8) for _ in range(buckets)]
        self.joined: set[int] = set()
        self._ranks = ranks
        self._changed = threading.Condition()
        self._serial = 0
        self._filled = 0
        self._released: dict[int, int] = {}
        self._closed: str | None = None

    def begin(self, serial: int) -> None:
        with self._changed:
            self._serial, self._filled = serial, 0
            self._released = dict.fromkeys(self._ranks, 0)
            self._changed.notify_all()

    def join(self, rank: int) -> None:
        with self._changed:
            self.joined.add(rank)
            self._changed.notify_all()

    def fill(self) -> None:
        with self._changed:
            self._filled += 1
            self._changed.notify_all()

    def release(self, rank: int) -> None:
        with self._changed:
            self._released[rank] += 1
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def wait_joined(self, deadline: Deadline) -> None:
        self._wait(lambda: self.joined >= set(self._ranks), deadline, "waiting for the workers to join")

    def wait_filled(self, serial: int, index: int, deadline: Deadline) -> None:
        self._wait(lambda: self._serial == serial and self._filled > index, deadline, "waiting for the trainer's bytes")

    def wait_released(self, count: int, deadline: Deadline) -> None:
        self._wait(lambda: min(self._released.values()) >= count, deadline, "waiting for a worker to load its bytes")

    def _wait(self, ready: Callable[[], bool], deadline: Deadline, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ready() or self._closed is not None, deadline.remaining())
            if ready():
                return
            if self._closed is not None:
                raise PeerLostError(f"The loopback endpoint was closed: {self._closed}.", backend="loopback")
            raise deadline.timeout(what, backend="loopback")


_rings: dict[str, Ring] = {}


class LoopbackTrainerEngine(TrainerWeightTransferEngine[LoopbackInitInfo, LoopbackUpdateInfo]):
    """Packs into the ring."""

    init_info_cls = LoopbackInitInfo
    update_info_cls = LoopbackUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._endpoint = secrets.token_hex(8)
        self._serial = 0

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        ranks = range(1, slots[0].world_size)
        _rings[self._endpoint] = Ring(ranks, self.config.bucket_bytes, self.config.buckets)
        return [{"endpoint": self._endpoint} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        self._ring().wait_joined(deadline)

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        self._serial += 1
        self._ring().begin(self._serial)
        return {"serial": self._serial}

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        ring = self._ring()
        plan = plan_buckets(manifest.params, self.config.bucket_bytes)
        packing = Packer(plan, ring.buffers).packing(tensor for _, tensor in source)
        for index in range(len(plan.buckets)):
            ring.wait_released(index + 1 - len(ring.buffers), deadline)
            nbytes = next(packing)
            ring.fill()
            progress(nbytes)
        ring.wait_released(len(plan.buckets), deadline)

    def abort_update(self) -> None:
        if self._endpoint in _rings:
            self._ring().close("the trainer aborted")

    def shutdown(self) -> None:
        ring = _rings.pop(self._endpoint, None)
        if ring is not None:
            ring.close("the trainer shut down")

    @property
    def extra_memory(self) -> int:
        return self.config.bucket_bytes * self.config.buckets if self._endpoint in _rings else 0

    def _ring(self) -> Ring:
        return _rings[self._endpoint]


class LoopbackWorkerEngine(WeightTransferEngine[LoopbackInitInfo, LoopbackUpdateInfo]):
    """Loads from the ring."""

    init_info_cls = LoopbackInitInfo
    update_info_cls = LoopbackUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._ring: Ring | None = None
        self._rank = 0
        self._plan: BucketPlan | None = None
        self._unpacker: Unpacker | None = None

    def init_transfer_engine(self, init_info: LoopbackInitInfo) -> None:
        if init_info.endpoint not in _rings:
            raise HandshakeError(
                "The trainer's loopback endpoint is not in this process; use ipc between processes.",
                backend="loopback",
            )
        self._ring = _rings[init_info.endpoint]
        self._rank = init_info.rank_offset + self.parallel_config.rank
        self._ring.join(self._rank)

    def receive_weights(self, update_info: LoopbackUpdateInfo, load_weights: LoadWeights) -> None:
        assert self._ring is not None
        deadline = Deadline(update_info.timeout)
        if self._plan is None or self._plan.params is not update_info.manifest.params:
            self._plan = plan_buckets(update_info.manifest.params, self._ring.buffers[0].numel())
            self._unpacker = Unpacker(self._plan, self._ring.buffers, shared=True)
        assert self._unpacker is not None
        for index in range(len(self._plan.buckets)):
            self._ring.wait_filled(update_info.serial, index, deadline)
            self._unpacker.load(index, load_weights)
            self._ring.release(self._rank)

    def abort_update(self) -> None:
        if self._ring is not None:
            self._ring.close("a worker aborted")

    @property
    def lost(self) -> bool:
        return self._ring is not None and self._ring.closed

    def shutdown(self) -> None:
        self._ring, self._plan, self._unpacker = None, None, None
