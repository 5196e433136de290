"""A worker's view of a trainer whose weights lie on a GPU: maps its memory and copies from it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import destinations_of, private_copies
from weight_transfer.errors import HandshakeError, ManifestMismatchError, TransferError
from weight_transfer_ipc import cuda
from weight_transfer_ipc.conversion import load_converted, split
from weight_transfer_ipc.copies import Copies, Spans, has_kernel
from weight_transfer_ipc.cuda_export import layouts
from weight_transfer_ipc.cuda_ring import POLL, CudaRingReader
from weight_transfer_ipc.device_memory import bytes_at
from weight_transfer_ipc.infos import Allocation
from weight_transfer_ipc.ring import RING
from weight_transfer_ipc.views import Views, chunks, views_of

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Export, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.infos import DeviceMemory, IpcUpdateInfo

_CHUNK = 512 * 2**20  # bytes that a loader is given at a time
_COPIED = 128 * 2**20  # the same for a loader that may write into what it is given, and so is given copies
_PART = 1024  # tensors whose places are compared before their copies are queued


def require_reachable(gpu: str, device: torch.device) -> None:
    """Raise unless ``device`` can read the memory of the GPU with that UUID.

    Raises:
        HandshakeError: it cannot; the sentence says why.
    """
    index = device.index
    if gpu == cuda.uuid_of(index):
        return
    peer = cuda.find(gpu)
    if cuda.is_slice(index) or (peer is not None and cuda.is_slice(peer)):
        problem = "slices of a GPU (MIG) share no memory; put both sides into one slice"
    elif peer is not None and not cuda.can_access(index, peer):
        problem = f"{device} has no peer access to cuda:{peer}; put both sides on one GPU"
    else:
        return  # visible with access, or hidden by CUDA_VISIBLE_DEVICES: opening the memory will tell
    raise HandshakeError(
        f"This worker's GPU cannot read the trainer's: {problem}, or use the nccl backend.",
        backend="ipc",
        phase="init",
        peer="trainer",
    )


@attrs.define
class _Mapped:
    """An allocation of the trainer, mapped here. ``opened`` is False in the trainer's own process."""

    allocation: Allocation
    address: int
    memory: torch.Tensor
    opened: bool


@attrs.frozen
class _Part:
    """Copies into some of the worker's own tensors.

    Attributes:
        tensors: where to.
        layout: where these lay when the copies were made.
        copies: by the GPU that they read from.
    """

    tensors: list[torch.Tensor]
    layout: object
    copies: list[Copies]

    @property
    def unchanged(self) -> bool:
        """Whether all of the tensors still lie there."""
        return layouts(self.tensors) == self.layout


@attrs.frozen
class _InPlace:
    """Copies straight into the worker's own tensors.

    Attributes:
        destinations: what they were made for.
        written: the tensors that they write, by name.
        parts: the copies. Whether the tensors have moved is asked part by part, while the GPU copies earlier ones.
        rest: what must go through the loader: other layouts, other devices.
    """

    destinations: Mapping[str, torch.Tensor]
    written: Views
    parts: list[_Part]
    rest: list[Views]

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables of the copies take."""
        return sum(copies.nbytes for part in self.parts for copies in part.copies)


class CudaReader:
    """Reads update after update from the same mappings.

    Args:
        device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lane: torch.cuda.Stream | None = None
        self._mapped: dict[int, _Mapped] = {}
        self._ready: dict[str, Any] = {}
        self._export: Export | None = None
        self._device_memory: DeviceMemory | None = None
        self._manifest: Manifest | None = None
        self._views: Views | None = None
        self._masters: Views = []
        self._chunks: list[Views] | None = None
        self._in_place: _InPlace | None = None
        self._ring: CudaRingReader | None = None

    @property
    def extra_memory(self) -> int:
        """Bytes of device memory beside the weights: the tables of the copies."""
        tables = self._in_place.table_bytes if self._in_place else 0
        return tables + (self._ring.extra_memory if self._ring is not None else 0)

    def read(self, info: IpcUpdateInfo, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        """Load every parameter; on return, and after an error, nothing of it is left on the GPU."""
        trainer.check_alive()
        with torch.cuda.device(self._device):
            lane = self._lane = self._lane or torch.cuda.Stream(self._device)
            if (
                self._export is not info.export
                or self._manifest is not info.manifest
                or self._device_memory is not info.device_memory
            ):
                self._map(info, trainer, deadline)
            self._await_weights(trainer, deadline)
            lane.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(lane):
                    self._read(load_weights, trainer, deadline)
                    if self._ring is not None:
                        self._ring.read(load_weights, trainer, deadline)
                self._finish(lane, deadline)
                trainer.check_alive()
            except BaseException:
                lane.synchronize()  # it holds copies only, which end by themselves
                raise
        if not info.keep_mapped:
            self.close()

    def close(self) -> None:
        """Unmap everything. Nothing may be under way."""
        self._forget()
        self._unmap(self._mapped.keys())

    def _read(self, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        destinations = destinations_of(load_weights)
        if destinations is not None and has_kernel():
            work = self._copy_in_place(destinations, load_weights)
            if work.written:
                load_weights(work.written)  # checks and counts them, while the GPU copies
            parts = work.rest
        else:
            nbytes = _CHUNK if destinations is not None else _COPIED
            parts = self._chunks = self._chunks or chunks(self._all_views(), nbytes)
        for part in parts:
            deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
            trainer.check_alive()
            load_weights(part if destinations is not None else private_copies(part))
        for part in chunks(self._masters, _CHUNK):
            deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
            trainer.check_alive()
            assert self._manifest is not None
            load_converted(part, self._manifest, load_weights)

    def _await_weights(self, trainer: Connection, deadline: Deadline) -> None:
        """Wait, on the host, until the trainer's streams have come to where `send` was called.

        The stream does not wait for the event itself: if the trainer died before it happened, the stream would never
        drain, and the deadline could not be kept.
        """
        for gpu, event in self._ready.items():
            if event is None:
                torch.cuda.synchronize(cuda.find(gpu))
                continue
            while not event.query():
                deadline.check("waiting for the trainer's stream", backend="ipc", phase="update", peer="trainer")
                trainer.check_alive()
                time.sleep(POLL)

    def _finish(self, lane: torch.cuda.Stream, deadline: Deadline) -> None:
        end = lane.record_event()
        while not end.query():
            deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
            time.sleep(POLL)

    # What is made once per export.

    def _map(self, info: IpcUpdateInfo, trainer: Connection, deadline: Deadline) -> None:
        memory = info.device_memory
        if memory is None:
            raise ManifestMismatchError("The trainer exports host memory to a worker on a GPU.", backend="ipc")
        self._forget()
        wanted = {allocation.id: allocation for allocation in memory.allocations}
        self._unmap([key for key, mapped in self._mapped.items() if wanted.get(key) != mapped.allocation])
        same_process = trainer.pid == os.getpid()
        for allocation in memory.allocations:
            deadline.check("mapping the trainer's memory", backend="ipc", phase="update")
            if allocation.id not in self._mapped:
                self._mapped[allocation.id] = self._open(allocation, same_process)
        if same_process:
            self._ready = dict.fromkeys(memory.ready)
        else:
            events = {gpu: bytes.fromhex(handle) for gpu, handle in memory.ready.items()}
            self._ready = {gpu: torch.cuda.Event.from_ipc_handle(self._device, e) for gpu, e in events.items()}
        if info.ring is not None:
            ring = self._mapped.get(RING)
            if ring is None or ring.allocation.nbytes < info.ring.nbytes:
                raise ManifestMismatchError("The trainer's ring has no memory.", backend="ipc")
            peer = ring.allocation.gpu != cuda.uuid_of(self._device.index)
            self._ring = CudaRingReader(info.ring, ring.memory, info.export.staged(info.manifest), peer)
        self._export, self._device_memory, self._manifest = info.export, memory, info.manifest

    def _open(self, allocation: Allocation, same_process: bool) -> _Mapped:
        if same_process:
            address, index = allocation.address, cuda.find(allocation.gpu)
            assert index is not None  # this process exported it
            memory = bytes_at(address, allocation.nbytes, torch.device("cuda", index))
            return _Mapped(allocation, address, memory, opened=False)
        try:
            address = cuda.open_handle(allocation.handle, self._device.index)
        except TransferError as error:
            raise HandshakeError(
                f"{self._device} cannot map the trainer's memory; CUDA IPC needs both in one IPC and PID namespace "
                "(docker run --ipc and --pid), and peer access between two GPUs. Or use the nccl backend.",
                backend="ipc",
                phase="update",
                peer="trainer",
                cause=error.cause,
            ) from error
        return _Mapped(allocation, address, bytes_at(address, allocation.nbytes, self._device), opened=True)

    def _unmap(self, keys: Sequence[int] | Any) -> None:
        for key in list(keys):
            mapped = self._mapped.pop(key)
            if mapped.opened:
                cuda.close_handle(mapped.address, self._device.index)

    def _forget(self) -> None:
        self._views, self._chunks, self._in_place, self._ring = None, None, None, None
        self._masters = []
        self._export, self._device_memory, self._manifest = None, None, None
        self._ready = {}

    def _all_views(self) -> Views:
        if self._views is None:
            assert self._export is not None and self._manifest is not None
            memory = {key: mapped.memory for key, mapped in self._mapped.items()}
            self._views, self._masters = split(views_of(self._export, self._manifest, memory), self._manifest)
        return self._views

    def _copy_in_place(self, destinations: Mapping[str, torch.Tensor], load_weights: LoadWeights) -> _InPlace:
        """Queue the copies into ``destinations``; if one of these has moved, plan them anew and begin again."""
        work, lane = self._in_place, self._lane
        assert lane is not None
        if work is None or work.destinations is not destinations:
            work = self._in_place = self._plan_in_place(destinations)
        load_weights.write_in_place()  # type: ignore[attr-defined]  # whoever has destinations has this too
        while True:
            for part in work.parts:
                if not part.unchanged:
                    break
                for copies in part.copies:
                    copies.run(lane)
            else:
                return work
            lane.synchronize()  # copies only, which end by themselves
            work = self._in_place = self._plan_in_place(destinations)

    def _plan_in_place(self, destinations: Mapping[str, torch.Tensor]) -> _InPlace:
        own = cuda.uuid_of(self._device.index)
        assert self._export is not None
        rows: list[tuple[torch.Tensor, bool, tuple[int, int, int]]] = []
        written, rest = [], []
        homes = {self._mapped[s.id].memory.untyped_storage().data_ptr(): s.id for s in self._export.segments}
        for name, view in self._all_views():
            destination = destinations[name]
            if not (view.device == destination.device == self._device) or not (
                view.is_contiguous() and destination.is_contiguous()
            ):
                rest.append((name, view))
                continue
            home = homes[view.untyped_storage().data_ptr()]
            peer = self._mapped[home].allocation.gpu != own
            span = view.data_ptr(), destination.data_ptr(), view.numel() * view.element_size()
            rows.append((destination, peer, span))
            written.append((name, destination))
        parts = [self._part(rows[start : start + _PART]) for start in range(0, len(rows), _PART)]
        return _InPlace(destinations, written, parts, chunks(rest, _CHUNK))

    def _part(self, rows: Sequence[tuple[torch.Tensor, bool, tuple[int, int, int]]]) -> _Part:
        tensors = [tensor for tensor, _, _ in rows]
        copies = []
        for peer in (False, True):
            spans = [span for _, on_peer, span in rows if on_peer is peer]
            if spans:
                sources, targets, sizes = zip(*spans, strict=True)
                copies.append(Copies(Spans.of(sources, targets, sizes), self._device, peer))
        return _Part(tensors, layouts(tensors), copies)
