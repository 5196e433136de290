"""Both engines of the ``ipc`` backend, on CPU tensors.

The trainer exports the memory of its parameters once; each worker maps it once and from then on copies straight from
the trainer's parameters into its own: one copy per byte, while ``send`` waits. What cannot be exported goes through a
ring of shared buckets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.deadline import Deadline
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, ManifestMismatchError, PeerLostError, TransferTimeoutError
from weight_transfer.export import Export, Exporter
from weight_transfer.info import WeightTransferInitInfo, WeightTransferUpdateInfo, sent_once
from weight_transfer.shared_memory import map_read_only
from weight_transfer_ipc.connection import Connection, Listener
from weight_transfer_ipc.ring import RingLayout, RingReader, RingWriter

if TYPE_CHECKING:
    import torch

    from weight_transfer.config import ParallelConfig, WeightTransferConfig
    from weight_transfer.manifest import Manifest
    from weight_transfer.source import WeightSource

_RING = 0  # the ring's segment id; exported segments count from 1
_CHUNK = 64 * 2**20  # bytes between two looks at the deadline and at the trainer


@attrs.frozen(kw_only=True)
class IpcInitInfo(WeightTransferInitInfo):
    """Where to connect.

    Attributes:
        address: abstract Unix address of the trainer's socket.
        token: what to show there.
    """

    address: str
    token: str = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are.

    Attributes:
        export: the exported parameters.
        ring: the ring for the staged ones, if there are any.
    """

    export: Export = sent_once()
    ring: RingLayout | None = None


class IpcTrainerEngine(TrainerWeightTransferEngine[IpcInitInfo, IpcUpdateInfo]):
    """Exports the trainer's weights."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._listener: Listener | None = None
        self._joining: dict[int, str] = {}
        self._workers: dict[int, Connection] = {}
        self._sent: dict[int, set[int]] = {}
        self._exporter = Exporter(adopt=config.options.export == "adopt")
        self._export: Export | None = None
        self._staged: Manifest | None = None
        self._ring: RingWriter | None = None

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        self._listener = self._listener or Listener()
        self._joining = {slot.rank_offset + i: slot.peer for slot in slots for i in range(slot.count)}
        return [{"address": self._listener.address, "token": self._listener.token} for _ in slots]

    def join_workers(self, deadline: Deadline) -> None:
        assert self._listener is not None
        while self._joining:
            try:
                accepted = self._listener.accept(deadline)
            except TransferTimeoutError as error:
                waiting = ", ".join(self._joining.values())
                raise deadline.timeout(f"waiting for {waiting} to connect", backend="ipc", peer=waiting) from error
            except PeerLostError:
                self._listener.close()
                self._listener, self._joining = None, {}
                raise
            if accepted is None or accepted[0] not in self._joining:
                continue
            rank, connection = accepted
            connection.peer = self._joining.pop(rank)
            connection.send({"welcome": rank}, [], deadline)
            if rank in self._workers:
                self._workers[rank].close()
            self._workers[rank], self._sent[rank] = connection, set()

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        export = self._exporter.refresh(manifest, source.resident())
        if export is not self._export:
            self._export, self._staged = export, export.staged(manifest)
        assert self._staged is not None
        if self._staged.params and self._ring is None:
            self._ring = RingWriter(RingLayout(self.config.bucket_bytes, self.config.buckets))
        return {"export": export, "ring": self._ring.layout if self._ring and self._staged.params else None}

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        assert self._export is not None and self._staged is not None
        for rank, worker in list(self._workers.items()):
            try:
                self._pass_segments(rank, worker, deadline)
            except PeerLostError:  # the worker's own answer will say so; the others go on
                self._workers.pop(rank).close()
        if self._staged.params and self._ring is not None:
            readers = list(self._workers.values())
            self._ring.write(self._staged, self._staged_tensors(source), readers, deadline, progress)

    def abort_update(self) -> None:
        if self._joining and self._listener is not None:  # those that joined before are not to suffer
            self._listener.interrupt()
            return
        for worker in list(self._workers.values()):
            worker.interrupt()

    def shutdown(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._sent.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._exporter.close()
        self._export = self._staged = None
        self._ring = None

    @property
    def extra_memory(self) -> int:
        return self._ring.layout.nbytes if self._ring is not None else 0

    def _pass_segments(self, rank: int, worker: Connection, deadline: Deadline) -> None:
        """Send a worker the file descriptors that it does not have yet."""
        assert self._export is not None and self._staged is not None
        fds = {segment.id: self._exporter.segment(segment.id).fd for segment in self._export.segments}
        if self._staged.params and self._ring is not None:
            fds[_RING] = self._ring.memory.fd
        for segment_id, fd in fds.items():
            if segment_id not in self._sent[rank]:
                worker.send({"segment": segment_id}, [fd], deadline)
        self._sent[rank] = set(fds)

    def _staged_tensors(self, source: WeightSource) -> Iterator[torch.Tensor]:
        assert self._staged is not None
        wanted = self._staged.by_name
        return (tensor for name, tensor in source if name in wanted)


class IpcWorkerEngine(WeightTransferEngine[IpcInitInfo, IpcUpdateInfo]):
    """Maps the trainer's weights and copies them."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._trainer: Connection | None = None
        self._memory: dict[int, torch.Tensor] = {}
        self._export: Export | None = None
        self._manifest: Manifest | None = None
        self._chunks: list[list[tuple[str, torch.Tensor]]] = []
        self._ring: RingReader | None = None

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        self._trainer = Connection.connect(init_info.address, deadline)
        rank = init_info.rank_offset + self.parallel_config.rank
        self._trainer.send({"token": init_info.token, "rank": rank}, [], deadline)
        welcome, _ = self._trainer.receive(deadline)
        if welcome != {"welcome": rank}:
            raise HandshakeError(
                "The trainer's socket answered with something else than a welcome.", backend="ipc", peer="trainer"
            )

    def receive_weights(self, update_info: IpcUpdateInfo, load_weights: LoadWeights) -> None:
        assert self._trainer is not None
        deadline = Deadline(update_info.timeout)
        if self._export is not update_info.export or self._manifest is not update_info.manifest:
            self._map(update_info, self._trainer, deadline)
        for chunk in self._chunks:
            deadline.check("copying from shared memory", backend="ipc", phase="update")
            self._trainer.check_alive()
            load_weights(chunk)
        if self._ring is not None:
            self._ring.read(load_weights, self._trainer, deadline)

    def abort_update(self) -> None:
        if self._trainer is not None:
            self._trainer.interrupt()

    def shutdown(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
        self._chunks, self._ring, self._export, self._manifest = [], None, None, None
        self._memory.clear()

    def _map(self, info: IpcUpdateInfo, trainer: Connection, deadline: Deadline) -> None:
        """Map the segments that are new, drop those that are gone, and make the views, once per export."""
        sizes = {segment.id: segment.nbytes for segment in info.export.segments}
        if info.ring is not None:
            sizes[_RING] = info.ring.nbytes
        if len(info.export.segment_ids) != len(info.manifest.params) or len(info.export.offsets) != len(
            info.manifest.params
        ):
            raise ManifestMismatchError(
                "The trainer's table of addresses and its manifest differ in length.", backend="ipc"
            )
        self._chunks, self._ring = [], None
        self._memory = {segment: memory for segment, memory in self._memory.items() if segment in sizes}
        while self._memory.keys() != sizes.keys():
            self._receive_segment(sizes, trainer, deadline)
        try:
            self._chunks = _chunks(info.export.views(info.manifest, self._memory))
        except (RuntimeError, KeyError) as error:
            raise ManifestMismatchError(
                "The trainer's table of addresses points beyond its segments.", backend="ipc", cause=str(error)
            ) from error
        if info.ring is not None:
            self._ring = RingReader(info.ring, self._memory[_RING], info.export.staged(info.manifest))
        self._export, self._manifest = info.export, info.manifest

    def _receive_segment(self, sizes: dict[int, int], trainer: Connection, deadline: Deadline) -> None:
        message, fds = trainer.receive(deadline)
        segment = message.get("segment")
        if len(fds) != 1 or not isinstance(segment, int) or segment not in sizes or segment in self._memory:
            for fd in fds:
                os.close(fd)
            raise HandshakeError(
                f"The trainer sent segment {segment!r}, which was not announced.", backend="ipc", peer="trainer"
            )
        self._memory[segment] = map_read_only(fds[0], sizes[segment])


def _chunks(views: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    chunks: list[list[tuple[str, torch.Tensor]]] = []
    room = 0
    for name, view in views:
        nbytes = view.numel() * view.element_size()
        if nbytes > room or not chunks:
            chunks.append([])
            room = _CHUNK
        chunks[-1].append((name, view))
        room -= nbytes
    return chunks
