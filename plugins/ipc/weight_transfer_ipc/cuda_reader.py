"""A worker's view of a trainer whose weights lie on a GPU: maps its memory and copies from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.authoring import Boxes, WeightCopies, destinations_of, has_kernel, private_copies
from weight_transfer.errors import HandshakeError, ManifestMismatchError
from weight_transfer_ipc import cuda
from weight_transfer_ipc.conversion import load_converted, split
from weight_transfer_ipc.copies import OWN, PEER, Copies
from weight_transfer_ipc.cuda_mapping import Mappings, finish
from weight_transfer_ipc.cuda_ring import CudaRingReader
from weight_transfer_ipc.ring import RING
from weight_transfer_ipc.views import Views, chunks, views_of

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Export, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.infos import DeviceMemory, IpcUpdateInfo

_CHUNK = 512 * 2**20  # bytes that a loader is given at a time
_COPIED = 128 * 2**20  # the same for a loader that may write into what it is given, and so is given copies
_FIRST, _MOST = 16, 1024  # weights whose copies are queued at once: few first, so that the GPU begins soon
_GROWTH = 1.5  # of that: what takes place on the host before copies are queued takes about as long as so many copies


def require_reachable(gpu: str, device: torch.device, trainer: str) -> None:
    """Raise unless ``device`` can read the memory of the GPU with that UUID, a trainer rank's.

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
        peer=trainer,
    )


@attrs.frozen(eq=False)
class _Part:
    """Copies of some weights straight into the worker's own tensors, without digests by the fastest way there is."""

    names: tuple[str, ...]
    weights: WeightCopies
    alone: list[Copies]

    @classmethod
    def of(cls, rows: Sequence[_Row], device: torch.device) -> _Part:
        alone = []
        for peer, side in ((False, OWN), (True, PEER)):
            some = [row for row in rows if row.on_peer is peer]
            if some:
                sources, targets = ([getattr(row, name).data_ptr() for row in some] for name in ("source", "target"))
                sizes = [row.target.nbytes for row in some]
                alone.append(Copies(Boxes.contiguous(sources, targets, sizes), device, side))

        def run() -> None:
            for copies in alone:
                copies.run(torch.cuda.current_stream(device.index))

        weights = WeightCopies([row.target for row in rows], [row.source for row in rows], run)
        return cls(tuple(row.name for row in rows), weights, alone)

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables of the copies take."""
        return self.weights.table_bytes + sum(copies.nbytes for copies in self.alone)


@attrs.frozen(eq=False)
class _Row:
    """A weight that is copied straight into the worker's own tensor."""

    name: str
    source: torch.Tensor
    target: torch.Tensor
    on_peer: bool


@attrs.frozen(eq=False)
class _InPlace:
    """Copies straight into the worker's own tensors.

    Attributes:
        destinations: what they were made for: as long as it is the same object, none of them has moved.
        parts: the copies; while the GPU makes the first ones, the next ones are queued.
        rest: what must go through the loader: other layouts, other devices.
    """

    destinations: Mapping[str, torch.Tensor]
    parts: list[_Part]
    rest: list[Views]


class CudaReader:
    """Reads update after update from the same mappings.

    Args:
        device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lane: torch.cuda.Stream | None = None
        self._mappings = Mappings(device)
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
        tables = sum(part.table_bytes for part in self._in_place.parts) if self._in_place else 0
        return tables + (self._ring.extra_memory if self._ring is not None else 0)

    @property
    def mapped_allocations(self) -> int:
        """How many allocations are mapped now."""
        return len(self._mappings.memory)

    def read(self, info: IpcUpdateInfo, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        """Load every parameter; on return, and after an error, nothing of it is left on the GPU."""
        trainer.check_alive()
        index = self._device.index  # torch takes ten times as long to see which one another device is
        with torch.cuda.device(index):
            lane = self._lane = self._lane or torch.cuda.Stream(self._device)
            if (
                self._export is not info.export
                or self._manifest is not info.manifest
                or self._device_memory is not info.device_memory
            ):
                self._map(info, trainer, deadline)
            self._mappings.await_ready(trainer, deadline)
            before = torch.cuda.current_stream(index)
            lane.wait_stream(before)
            try:
                with _on(lane, before):
                    self._read(load_weights, trainer, deadline)
                    if self._ring is not None:
                        self._ring.read(load_weights, trainer, deadline)
                finish([lane], deadline)
                trainer.check_alive()
            except BaseException:
                lane.synchronize()  # it holds copies only, which end by themselves
                raise
        if not info.keep_mapped:
            self.close()

    def close(self) -> None:
        """Unmap everything. Nothing may be under way."""
        self._forget()
        self._mappings.close()

    def _read(self, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        destinations = destinations_of(load_weights)
        if destinations is not None and has_kernel():
            if self._in_place is None or self._in_place.destinations is not destinations:
                self._in_place = self._plan_in_place(destinations)
            for part in self._in_place.parts:
                load_weights.copy(part.weights, part.names)  # type: ignore[attr-defined]  # whoever has destinations has this
            others = self._in_place.rest
        else:
            nbytes = _CHUNK if destinations is not None else _COPIED
            others = self._chunks = self._chunks or chunks(self._all_views(), nbytes)
        for some in others:
            deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
            trainer.check_alive()
            load_weights(some if destinations is not None else private_copies(some))
        for some in chunks(self._masters, _CHUNK):
            deadline.check("copying from the trainer's memory", backend="ipc", phase="update")
            trainer.check_alive()
            assert self._manifest is not None
            load_converted(some, self._manifest, load_weights)

    # What is made once per export.

    def _map(self, info: IpcUpdateInfo, trainer: Connection, deadline: Deadline) -> None:
        memory = info.device_memory
        if memory is None:
            raise ManifestMismatchError("The trainer exports host memory to a worker on a GPU.", backend="ipc")
        self._forget()
        self._mappings.refresh(memory, trainer, deadline)
        if info.ring is not None:
            ring = self._mappings.memory.get(RING)
            if ring is None or ring.nbytes < info.ring.nbytes:
                raise ManifestMismatchError("The trainer's ring has no memory.", backend="ipc")
            peer = self._mappings.gpus[RING] != cuda.uuid_of(self._device.index)
            self._ring = CudaRingReader(info.ring, ring, info.export.staged(info.manifest), peer)
        self._export, self._device_memory, self._manifest = info.export, memory, info.manifest

    def _forget(self) -> None:
        self._views, self._chunks, self._in_place, self._ring = None, None, None, None
        self._masters = []
        self._export, self._device_memory, self._manifest = None, None, None
        self._mappings.forget_events()

    def _all_views(self) -> Views:
        if self._views is None:
            assert self._export is not None and self._manifest is not None
            views = views_of(self._export, self._manifest, self._mappings.memory)
            self._views, self._masters = split(views, self._manifest)
        return self._views

    def _plan_in_place(self, destinations: Mapping[str, torch.Tensor]) -> _InPlace:
        own = cuda.uuid_of(self._device.index)
        assert self._export is not None
        rows: list[_Row] = []
        rest = []
        memory, gpus = self._mappings.memory, self._mappings.gpus
        homes = {memory[s.id].untyped_storage().data_ptr(): gpus[s.id] for s in self._export.segments}
        for name, view in self._all_views():
            target = destinations[name]
            is_here = view.device == target.device == self._device
            if is_here and view.is_contiguous() and target.is_contiguous():
                rows.append(_Row(name, view, target, homes[view.untyped_storage().data_ptr()] != own))
            else:
                rest.append((name, view))
        parts = []
        start, size = 0, float(_FIRST)
        while start < len(rows):
            parts.append(_Part.of(rows[start : start + int(size)], self._device))
            start, size = start + int(size), min(_GROWTH * size, _MOST)
        return _InPlace(destinations, parts, chunks(rest, _CHUNK))


@contextmanager
def _on(lane: torch.cuda.Stream, before: torch.cuda.Stream) -> Iterator[None]:
    """Have one stream of the current device be the current one, instead of that which is; torch's asks which it is."""
    torch.cuda.set_stream(lane)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
