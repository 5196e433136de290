"""Both engines of the ``nccl`` backend: the trainer broadcasts what goes whole, and each of its ranks sends regions.

With several trainer ranks there are two communicators: that of rank 0 and the workers, and that of all ranks and the
workers, in which the ranks come first. A single one has the first for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import (
    Deadline,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    structure,
    unstructure,
)
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import ConfigError, HandshakeError, ManifestMismatchError
from weight_transfer_nccl.buffers import Buffers
from weight_transfer_nccl.group import Group, join_groups
from weight_transfer_nccl.meeting_place import MeetingPlace
from weight_transfer_nccl.plan import Layout, Plan, make_plan
from weight_transfer_nccl.receiving import Receiving
from weight_transfer_nccl.region_receiving import RegionReceiving
from weight_transfer_nccl.region_sending import RegionSending
from weight_transfer_nccl.rendezvous import Rendezvous
from weight_transfer_nccl.sending import Sending

if TYPE_CHECKING:
    from weight_transfer.authoring import (
        IncomingRegions,
        Manifest,
        OutgoingRegions,
        ParallelConfig,
        WeightSource,
        WeightTransferConfig,
    )


_PROTOCOL = 2
"""Another one whenever members do something else together. 2: they agree on launches before each update."""


@attrs.frozen(kw_only=True)
class NcclInitInfo(WeightTransferInitInfo):
    """How to meet, and how the trainer cuts its weights.

    Attributes:
        rendezvous: where the members meet.
        layout: the trainer's.
        protocol: of what members do together; a worker of another one does not join.
    """

    rendezvous: Rendezvous
    layout: Layout
    protocol: int = 1


@attrs.frozen(kw_only=True)
class NcclUpdateInfo(WeightTransferUpdateInfo):
    """``plan``: digest of the trainer's plan of what goes whole; None if nothing does."""

    plan: str | None = None


class _Groups:
    """The communicators of one member, joined, guarded and aborted together.

    Attributes:
        whole: of trainer rank 0 and the workers; None on other trainer ranks.
        regions: of all trainer ranks and the workers.
    """

    def __init__(self, whole: Group | None, regions: Group | None) -> None:
        self.whole = whole
        self.regions = regions

    def all(self) -> list[Group]:
        """Return all of them, in the order in which they are joined."""
        own = [self.whole] if self.regions is self.whole else [self.whole, self.regions]
        return [group for group in own if group is not None]

    def abort(self) -> None:
        """Make everything end soon."""
        for group in self.all():
            group.begin_abort()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Once an error leaves it, members that wait in the other communicator hear of it, too."""
        try:
            yield
        except BaseException:
            self.abort()
            raise


class NcclTrainerEngine(TrainerWeightTransferEngine[NcclInitInfo, NcclUpdateInfo]):
    """Packs, and broadcasts or sends."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._device = torch.device(parallel_config.device or "cpu")
        self._layout = Layout(config.bucket_bytes, config.buckets, config.options.direct_bytes)
        self._peers: list[str] = []
        self._groups = _Groups(None, None)
        self._place: MeetingPlace | None = None
        self._buffers = Buffers(config.buckets, self._device)
        self._plan: Plan | None = None
        self._all_stay = False
        self._sending: Sending | None = None
        self._regions: RegionSending | None = None

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        options = self.config.options
        transport = _transport(options.transport, self._device)
        self._close_place()
        members = slots[0].world_size + self.parallel_config.world_size
        self._place = MeetingPlace(options.address, options.port, members)
        meeting = self._place.meeting(transport, options.interface)
        self._open(Group(meeting, 0, slots[0].world_size, self._device), meeting, slots)
        return [{"rendezvous": meeting, "layout": self._layout, "protocol": _PROTOCOL} for _ in slots]

    def open_rank(self, first: Mapping[str, Any], slots: Sequence[WorkerSlot], deadline: Deadline) -> dict[str, Any]:
        own = unstructure(dict(first))
        place = {"rank_offset": 1, "world_size": slots[0].world_size, "timeout": deadline.seconds}
        info: NcclInitInfo = structure({**own, **place}, NcclInitInfo, "what trainer rank 0 opened")
        _require_same_transport("Trainer rank 0", info.rendezvous, f"trainer rank {self._rank}", self._device)
        self._layout = info.layout
        self._open(None, info.rendezvous, slots)
        return {"rendezvous": info.rendezvous, "layout": info.layout, "protocol": info.protocol}

    def _open(self, whole: Group | None, meeting: Rendezvous, slots: Sequence[WorkerSlot]) -> None:
        ranks, workers = self.parallel_config.world_size, slots[0].world_size - 1
        regions = whole if ranks == 1 else _regions_group(meeting, self._rank, ranks, workers, self._device)
        self._groups = _Groups(whole, regions)
        self._peers = [
            slot.peer for slot in sorted(slots, key=lambda slot: slot.rank_offset) for _ in range(slot.count)
        ]
        self._regions = RegionSending(self._layout, ranks, workers, self._device, self._buffers)

    @property
    def _rank(self) -> int:
        return self.parallel_config.rank

    def join_workers(self, deadline: Deadline) -> None:
        whole = self._groups.whole
        ranks = self.parallel_config.world_size

        def name_of(trainers: int, member: int) -> str:
            return f"trainer rank {member}" if member < trainers else self._peers[member - trainers]

        groups = [(group, partial(name_of, 1 if group is whole else ranks)) for group in self._groups.all()]
        try:
            join_groups(groups, deadline)
        finally:
            if self._place is not None:
                self._place.stop_listening()

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        if self._plan is None or self._plan.manifest is not manifest:
            self._plan = make_plan(manifest, self._layout)
        self._all_stay = len(source.resident()) == len(manifest.params)
        return {"plan": self._plan.digest}

    @property
    def tolerates_moves(self) -> bool:
        """Whether it looks by itself where each weight lies before it is sent: each that stays where it is."""
        return self._all_stay

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        assert self._groups.whole is not None and self._plan is not None
        self._sending = self._sending or Sending(self._layout, self._device, self._buffers)
        with self._groups.failing_together():
            self._sending.send(
                self._groups.whole, self._plan, source, deadline, progress, may_be_long=self.config.verify == "none"
            )

    def share_regions(self, outgoing: OutgoingRegions, deadline: Deadline) -> dict[str, Any]:
        assert self._regions is not None
        return self._regions.share(outgoing)

    def send_regions(self, outgoing: OutgoingRegions, deadline: Deadline, progress: Callable[[int], None]) -> None:
        assert self._groups.regions is not None and self._regions is not None
        with self._groups.failing_together():
            self._regions.send(self._groups.regions, outgoing, deadline, progress)

    def abort_update(self) -> None:
        self._groups.abort()

    def shutdown(self) -> None:
        self.abort_update()
        self._close_place()
        self._groups = _Groups(None, None)
        self._plan = self._sending = self._regions = None
        self._buffers = Buffers(self.config.buckets, self._device)

    def _close_place(self) -> None:
        if self._place is not None:
            self._place.close()
            self._place = None

    @property
    def extra_memory(self) -> int:
        return self._buffers.nbytes + _table_bytes(self._sending, self._regions)


class NcclWorkerEngine(WeightTransferEngine[NcclInitInfo, NcclUpdateInfo]):
    """Receives and loads."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._device = torch.device(parallel_config.device or "cpu")
        self._layout: Layout | None = None
        self._groups = _Groups(None, None)
        self._buffers: Buffers | None = None
        self._plan: Plan | None = None
        self._receiving: Receiving | None = None
        self._regions: RegionReceiving | None = None

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        meeting, ranks, workers = init_info.rendezvous, init_info.trainer_ranks, init_info.world_size - 1
        if init_info.protocol != _PROTOCOL:
            raise HandshakeError(
                f"The trainer speaks protocol {init_info.protocol} of weight-transfer-nccl, this worker {_PROTOCOL}; "
                "install one version on both sides.",
                backend="nccl",
                phase="init",
            )
        _require_same_transport("The trainer", meeting, "this worker", self._device)
        self.transport = meeting.transport
        self._layout = init_info.layout
        self._buffers = Buffers(self._layout.buckets, self._device)
        rank = init_info.rank_offset + self.parallel_config.rank
        whole = Group(meeting, rank, init_info.world_size, self._device)
        member = ranks - 1 + rank
        regions = whole if ranks == 1 else _regions_group(meeting, member, ranks, workers, self._device)
        self._groups = _Groups(whole, regions)
        self._regions = RegionReceiving(self._layout, rank - 1, ranks, workers, self._device, self._buffers)

        def name_of(trainers: int, member: int) -> str:
            if member < trainers:
                return "the trainer" if ranks == 1 else f"trainer rank {member}"
            return f"rank {member - trainers + 1}"

        join_groups(
            [(group, partial(name_of, 1 if group is whole else ranks)) for group in self._groups.all()], deadline
        )

    def receive_weights(self, update_info: NcclUpdateInfo, load_weights: LoadWeights) -> None:
        assert self._groups.whole is not None and self._layout is not None and self._buffers is not None
        deadline = Deadline(update_info.timeout)
        if self._plan is None or self._plan.manifest is not update_info.manifest:
            self._plan = make_plan(update_info.manifest, self._layout)
        if self._plan.digest != update_info.plan:
            raise ManifestMismatchError(
                "The trainer's plan of broadcasts differs; use one version of weight-transfer-nccl on both sides.",
                backend="nccl",
                phase="update",
            )
        self._receiving = self._receiving or Receiving(self._device, self._buffers)
        with self._groups.failing_together():
            self._receiving.receive(
                self._groups.whole, self._plan, load_weights, deadline, may_be_long=update_info.verify is None
            )

    def receive_regions(self, update_info: NcclUpdateInfo, incoming: IncomingRegions) -> None:
        assert self._groups.regions is not None and self._regions is not None
        deadline = Deadline(update_info.timeout)
        with self._groups.failing_together():
            self._regions.receive(self._groups.regions, update_info.shares or (), incoming, deadline)

    def abort_update(self) -> None:
        self._groups.abort()

    def shutdown(self) -> None:
        self.abort_update()
        self._groups = _Groups(None, None)
        self._buffers = self._plan = self._receiving = self._regions = None

    @property
    def extra_memory(self) -> int:
        return (self._buffers.nbytes if self._buffers is not None else 0) + _table_bytes(self._receiving, self._regions)


def _table_bytes(*pipelines: Sending | Receiving | RegionSending | RegionReceiving | None) -> int:
    return sum(pipeline.table_bytes for pipeline in pipelines if pipeline is not None)


def _regions_group(meeting: Rendezvous, member: int, ranks: int, workers: int, device: torch.device) -> Group:
    return Group(meeting, member, ranks + workers, device, trainers=ranks)


def _require_same_transport(other: str, meeting: Rendezvous, this: str, device: torch.device) -> None:
    if meeting.transport != _transport("auto", device):
        raise HandshakeError(
            f"{other} sends over {meeting.transport}, but {this} has its weights on {device}; put all on CUDA devices "
            "or all on the CPU.",
            backend="nccl",
            phase="init",
        )


def _transport(wanted: str, device: torch.device) -> str:
    found = "nccl" if device.type == "cuda" else "gloo"
    if wanted not in ("auto", found):
        raise ConfigError(
            f"transport: {wanted!r} does not fit weights on {device}; use 'auto', or put the weights on "
            f"{'a CUDA device' if wanted == 'nccl' else 'the CPU'}."
        )
    return found
