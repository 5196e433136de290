"""A worker's view of trainer ranks whose shards lie on GPUs: maps their memory and copies the regions that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.errors import ManifestMismatchError
from weight_transfer_ipc.cuda_mapping import Mappings, finish
from weight_transfer_ipc.cuda_regions import CudaRegions, Origin
from weight_transfer_ipc.region_plan import RankPlan
from weight_transfer_ipc.ring import RING
from weight_transfer_ipc.shares import Share

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, IncomingRegions, Pieces
    from weight_transfer_ipc.infos import IpcUpdateInfo
    from weight_transfer_ipc.trainers import Trainers


class CudaRegionReader:
    """Reads update after update from the same mappings.

    Args:
        device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mappings: dict[int, Mappings] = {}
        self._shares: Sequence[Any] | None = None
        self._pieces: Pieces | None = None
        self._origins: list[Origin] = []
        self._regions: CudaRegions | None = None
        self._keep_mapped = True

    @property
    def extra_memory(self) -> int:
        """Bytes of device memory beside the weights: the tables of the copies."""
        return self._regions.table_bytes if self._regions is not None else 0

    @property
    def mapped_allocations(self) -> int:
        """How many allocations are mapped now."""
        return sum(len(mappings.memory) for mappings in self._mappings.values())

    def read(self, info: IpcUpdateInfo, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        """Write every piece; on return, and after an error, nothing of it is left on the GPU."""
        trainers.check_alive()
        with torch.cuda.device(self._device):
            if info.shares is not self._shares or incoming.pieces is not self._pieces:
                self._map(info, incoming, trainers, deadline)
            for origin in self._origins:
                self._mappings[origin.plan.rank].await_ready(trainers[origin.plan.rank], deadline)
            regions = self._regions
            if regions is None or not regions.fits(incoming.targets):
                regions = self._regions = CudaRegions(self._origins, incoming.targets, self._device)
            try:
                while not regions.copy(incoming):  # a target has moved
                    regions.synchronise()
                    regions = self._regions = CudaRegions(self._origins, incoming.targets, self._device)
                regions.copy_others(incoming, trainers, deadline)
                finish(regions.lanes, deadline)
                trainers.check_alive()
            except BaseException:
                regions.synchronise()  # they hold copies only, which end by themselves
                raise
        for rank, nbytes in enumerate(incoming.pieces.by_rank(len(trainers)).tolist()):
            if nbytes:
                incoming.moved(rank, nbytes)
        if not self._keep_mapped:
            self.close()

    def close(self) -> None:
        """Unmap everything. Nothing may be under way."""
        self._forget()
        for mappings in self._mappings.values():
            mappings.close()
        self._mappings.clear()

    def _map(self, info: IpcUpdateInfo, incoming: IncomingRegions, trainers: Trainers, deadline: Deadline) -> None:
        """Map what is new of those ranks from which something comes."""
        self._forget()
        if info.shares is None or len(info.shares) != len(trainers):
            raise ManifestMismatchError("An update by region came without the shares of all trainer ranks.")
        for rank in sorted(set(incoming.pieces.rank.tolist())):
            share = Share.from_wire(info.shares[rank], rank)
            if share.device_memory is None:
                raise ManifestMismatchError("The trainer exports host memory to a worker on a GPU.", backend="ipc")
            mappings = self._mappings.setdefault(rank, Mappings(self._device))
            mappings.refresh(share.device_memory, trainers[rank], deadline)
            self._keep_mapped = share.keep_mapped
            gpus = [mappings.gpus.get(segment, "") for segment in share.export.segment_ids]
            plan = RankPlan.of(incoming, rank, share, mappings.memory)
            self._origins.append(Origin(plan, gpus, mappings.gpus.get(RING, "")))
        self._shares, self._pieces = info.shares, incoming.pieces

    def _forget(self) -> None:
        self._shares, self._pieces, self._origins, self._regions = None, None, [], None
        for mappings in self._mappings.values():
            mappings.forget_events()
