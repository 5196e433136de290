"""A worker's view of a trainer whose weights lie in host memory: maps its segments and hands them to the loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from weight_transfer.authoring import HostCopies, destinations_of
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_ipc.conversion import load_converted, split
from weight_transfer_ipc.host_segments import receive_segments
from weight_transfer_ipc.ring import RING, RingReader
from weight_transfer_ipc.views import Views, chunks, views_of

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.authoring import Deadline, Export, Manifest, PrivateView
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.infos import IpcUpdateInfo

_CHUNK = 64 * 2**20  # bytes between two looks at the deadline and at the trainer


@attrs.frozen(eq=False)
class _Batch:
    """Copies straight into the worker's own tensors, and the names of the weights."""

    copies: HostCopies
    names: tuple[str, ...]

    @classmethod
    def of(cls, views: Views, destinations: Mapping[str, Tensor]) -> _Batch:
        names = tuple(name for name, _ in views)
        return cls(HostCopies([destinations[name] for name in names], [view for _, view in views]), names)


class HostReader:
    """Reads update after update from the same mappings."""

    extra_memory = 0
    mapped_allocations = 0

    def __init__(self) -> None:
        self._memory: dict[int, PrivateView] = {}
        self._export: Export | None = None
        self._manifest: Manifest | None = None
        self._chunks: list[Views] = []
        self._masters: list[Views] = []
        self._destinations: Mapping[str, Tensor] | None = None
        self._batches: list[_Batch] = []
        self._ring: RingReader | None = None

    def read(self, info: IpcUpdateInfo, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        """Load every parameter."""
        if self._export is not info.export or self._manifest is not info.manifest:
            self._map(info, trainer, deadline)
        destinations = destinations_of(load_weights)
        if destinations is None:
            self._load(info.manifest, load_weights, trainer, deadline)
        else:
            self._copy_in_place(destinations, load_weights, trainer, deadline)
        if self._ring is not None:
            self._ring.read(load_weights, trainer, deadline)

    def close(self) -> None:
        """Unmap everything."""
        self._forget()
        self._export, self._manifest = None, None
        self._memory.clear()

    def _forget(self) -> None:
        self._chunks, self._masters, self._batches, self._destinations, self._ring = [], [], [], None, None

    def _copy_in_place(
        self, destinations: Mapping[str, Tensor], load_weights: LoadWeights, trainer: Connection, deadline: Deadline
    ) -> None:
        if self._destinations is not destinations:
            chunks = (*self._chunks, *self._masters)
            self._batches = [_Batch.of(chunk, destinations) for chunk in chunks]
            self._destinations = destinations
        for batch in self._batches:
            deadline.check("copying from shared memory", backend="ipc", phase="update")
            trainer.check_alive()
            load_weights.copy(batch.copies, batch.names)  # type: ignore[attr-defined]  # whoever has destinations has this

    def _load(self, manifest: Manifest, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        for chunk in self._chunks:
            deadline.check("copying from shared memory", backend="ipc", phase="update")
            trainer.check_alive()
            load_weights(chunk)
        for chunk in self._masters:
            deadline.check("copying from shared memory", backend="ipc", phase="update")
            trainer.check_alive()
            load_converted(chunk, manifest, load_weights)
        for memory in self._memory.values():  # the loader may have written into what it was given
            memory.renew()

    def _map(self, info: IpcUpdateInfo, trainer: Connection, deadline: Deadline) -> None:
        """Map the segments that are new, drop those that are gone, and make the views, once per export."""
        if info.device_memory is not None:
            raise ManifestMismatchError("The trainer exports device memory to a worker on the CPU.", backend="ipc")
        sizes = {segment.id: segment.nbytes for segment in info.export.segments}
        if info.ring is not None:
            sizes[RING] = info.ring.nbytes
        self._forget()
        self._memory = receive_segments(self._memory, sizes, trainer, deadline)
        memory = {segment: view.data for segment, view in self._memory.items()}
        exact, masters = split(views_of(info.export, info.manifest, memory), info.manifest)
        self._chunks, self._masters = chunks(exact, _CHUNK), chunks(masters, _CHUNK)
        if info.ring is not None:
            self._ring = RingReader(info.ring, self._memory[RING], info.export.staged(info.manifest))
        self._export, self._manifest = info.export, info.manifest
