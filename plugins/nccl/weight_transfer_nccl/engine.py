"""Both engines of the ``nccl`` backend: the trainer broadcasts, all workers receive at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import Deadline, WeightTransferInitInfo, WeightTransferUpdateInfo
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import ConfigError, HandshakeError, ManifestMismatchError
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.plan import Layout, Plan, make_plan
from weight_transfer_nccl.receiving import Receiving
from weight_transfer_nccl.rendezvous import Rendezvous, new_secret, open_store
from weight_transfer_nccl.sending import Sending

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest, ParallelConfig, WeightSource, WeightTransferConfig


@attrs.frozen(kw_only=True)
class NcclInitInfo(WeightTransferInitInfo):
    """How to meet, and how the trainer cuts its weights."""

    rendezvous: Rendezvous
    layout: Layout


@attrs.frozen(kw_only=True)
class NcclUpdateInfo(WeightTransferUpdateInfo):
    """``plan``: digest of the trainer's plan."""

    plan: str


class NcclTrainerEngine(TrainerWeightTransferEngine[NcclInitInfo, NcclUpdateInfo]):
    """Packs and broadcasts."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._device = torch.device(parallel_config.device or "cpu")
        self._layout = Layout(config.bucket_bytes, config.buckets, config.options.direct_bytes)
        self._peers: dict[int, str] = {}
        self._group: Group | None = None
        self._plan: Plan | None = None
        self._sending: Sending | None = None

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        options = self.config.options
        transport = _transport(options.transport, self._device)
        store, port = open_store(options.address, options.port)
        meeting = Rendezvous(
            address=options.address, port=port, secret=new_secret(), transport=transport, interface=options.interface
        )
        self._peers = {slot.rank_offset + i: slot.peer for slot in slots for i in range(slot.count)}
        self._group = Group(store, meeting, 0, slots[0].world_size, self._device)
        return [{"rendezvous": meeting, "layout": self._layout} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        assert self._group is not None
        self._group.join(deadline, lambda rank: self._peers.get(rank, f"rank {rank}"))

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        if self._plan is None or self._plan.manifest is not manifest:
            self._plan = make_plan(manifest, self._layout)
        return {"plan": self._plan.digest}

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        assert self._group is not None and self._plan is not None
        self._sending = self._sending or Sending(self._layout, self._device)
        self._sending.send(self._group, self._plan, source, deadline, progress)

    def abort_update(self) -> None:
        if self._group is not None:
            self._group.abort()

    def shutdown(self) -> None:
        self.abort_update()
        self._group = self._plan = self._sending = None

    @property
    def extra_memory(self) -> int:
        return self._sending.extra_memory if self._sending is not None else 0


class NcclWorkerEngine(WeightTransferEngine[NcclInitInfo, NcclUpdateInfo]):
    """Receives and loads."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._device = torch.device(parallel_config.device or "cpu")
        self._layout: Layout | None = None
        self._group: Group | None = None
        self._plan: Plan | None = None
        self._receiving: Receiving | None = None

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        meeting = init_info.rendezvous
        if meeting.transport != _transport("auto", self._device):
            raise HandshakeError(
                f"The trainer broadcasts over {meeting.transport}, but this worker's weights lie on {self._device}; "
                "put both on CUDA devices or both on the CPU.",
                backend="nccl",
                phase="init",
            )
        self.transport = meeting.transport
        self._layout = init_info.layout
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = Group(None, meeting, rank, init_info.world_size, self._device)
        self._group.join(deadline, lambda rank: "the trainer" if rank == 0 else f"rank {rank}")

    def receive_weights(self, update_info: NcclUpdateInfo, load_weights: LoadWeights) -> None:
        assert self._group is not None and self._layout is not None
        deadline = Deadline(update_info.timeout)
        if self._plan is None or self._plan.manifest is not update_info.manifest:
            self._plan = make_plan(update_info.manifest, self._layout)
        if self._plan.digest != update_info.plan:
            raise ManifestMismatchError(
                "The trainer's plan of broadcasts differs; use one version of weight-transfer-nccl on both sides.",
                backend="nccl",
                phase="update",
            )
        self._receiving = self._receiving or Receiving(self._layout, self._device)
        self._receiving.receive(self._group, self._plan, load_weights, deadline)

    def abort_update(self) -> None:
        if self._group is not None:
            self._group.abort()

    def shutdown(self) -> None:
        self.abort_update()
        self._group = self._plan = self._receiving = None

    @property
    def extra_memory(self) -> int:
        return self._receiving.extra_memory if self._receiving is not None else 0


def _transport(wanted: str, device: torch.device) -> str:
    found = "nccl" if device.type == "cuda" else "gloo"
    if wanted not in ("auto", found):
        raise ConfigError(
            f"transport: {wanted!r} does not fit weights on {device}; use 'auto', or put the weights on "
            f"{'a CUDA device' if wanted == 'nccl' else 'the CPU'}."
        )
    return found
