"""Both engines of the ``ipc`` backend.

The trainer exports the memory of its parameters once; each worker maps it once and from then on copies straight from
the trainer's parameters into its own: one copy per byte, while ``send`` waits. What cannot be exported goes through a
ring of buckets. Host memory and GPU memory differ in a writer and a reader; a Unix socket per worker carries file
descriptors and small signals, and tells at once when a peer dies.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.authoring import Deadline
from weight_transfer.engine import LoadWeights, TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
from weight_transfer.errors import HandshakeError, PeerLostError, TransferTimeoutError
from weight_transfer_ipc import cuda
from weight_transfer_ipc.cuda_reader import CudaReader, require_reachable
from weight_transfer_ipc.cuda_region_reader import CudaRegionReader
from weight_transfer_ipc.cuda_region_writer import CudaRegionWriter
from weight_transfer_ipc.cuda_writer import CudaWriter
from weight_transfer_ipc.host_reader import HostReader
from weight_transfer_ipc.host_region_reader import HostRegionReader
from weight_transfer_ipc.host_region_writer import HostRegionWriter
from weight_transfer_ipc.host_writer import HostWriter
from weight_transfer_ipc.infos import IpcInitInfo, IpcUpdateInfo
from weight_transfer_ipc.listener import Listener
from weight_transfer_ipc.trainers import Trainers, rank_name

if TYPE_CHECKING:
    from weight_transfer.authoring import (
        IncomingRegions,
        Manifest,
        OutgoingRegions,
        ParallelConfig,
        WeightSource,
        WeightTransferConfig,
    )
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.region_writer import RegionWriter

logger = logging.getLogger(__name__)

_GOODBYE = 2.0  # seconds that workers get to unmap the trainer's memory before it is given back


class IpcTrainerEngine(TrainerWeightTransferEngine[IpcInitInfo, IpcUpdateInfo]):
    """Exports the trainer's weights."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        device = _numbered(parallel_config.device)
        self._gpu = cuda.uuid_of(device.index) if device.type == "cuda" else None
        on_gpu = device.type == "cuda"
        self._writer = CudaWriter(config, device) if on_gpu else HostWriter(config)
        self._regions: RegionWriter = CudaRegionWriter(config, device) if on_gpu else HostRegionWriter(config)
        self._listener: Listener | None = None
        self._joining: dict[int, str] = {}
        self._workers: dict[int, Connection] = {}

    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        info = self._open(slots)
        return [info for _ in slots]

    def open_rank(self, first: Mapping[str, Any], slots: Sequence[WorkerSlot], deadline: Deadline) -> dict[str, Any]:
        return self._open(slots)

    def _open(self, slots: Sequence[WorkerSlot]) -> dict[str, Any]:
        self._stop_listening()
        self._listener = Listener()
        self._joining = {slot.rank_offset + i: slot.peer for slot in slots for i in range(slot.count)}
        return {"address": self._listener.address, "token": self._listener.token, "gpu": self._gpu}

    def join_workers(self, deadline: Deadline) -> None:
        assert self._listener is not None
        try:
            while self._joining:
                accepted = self._listener.accept(deadline, wanted=lambda: bool(self._joining))
                if accepted is not None:
                    self._welcome(*accepted, deadline)
        except TransferTimeoutError as error:
            waiting = ", ".join(self._joining.values())
            raise deadline.timeout(f"waiting for {waiting} to connect", backend="ipc", peer=waiting) from error
        except PeerLostError:
            self._joining = {}
            raise
        finally:
            self._stop_listening()

    def _welcome(self, rank: int, connection: Connection, deadline: Deadline) -> None:
        if rank not in self._joining:
            connection.close()
            return
        connection.peer = self._joining.pop(rank, "a worker")
        connection.send({"welcome": rank}, [], deadline)
        if rank in self._workers:
            self._workers[rank].close()
        self._workers[rank] = connection
        self._writer.welcome(rank, connection.gpu)
        self._regions.welcome(rank)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        return self._writer.describe(source, manifest)

    @property
    def tolerates_moves(self) -> bool:
        return self._writer.tolerates_moves

    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        self._writer.send(source, self._workers, deadline, progress)

    def share_regions(self, outgoing: OutgoingRegions, deadline: Deadline) -> dict[str, Any]:
        return self._regions.share(outgoing)

    def send_regions(self, outgoing: OutgoingRegions, deadline: Deadline, progress: Callable[[int], None]) -> None:
        self._regions.send(outgoing, self._workers, deadline, progress)

    def release_source(self) -> None:
        self._writer.release()
        self._regions.release()

    def lose_worker(self, peer: str) -> None:
        for rank in [rank for rank, name in self._joining.copy().items() if name == peer]:
            self._joining.pop(rank, None)
        for worker in list(self._workers.values()):
            if worker.peer == peer:  # it may have refused the update without a word here
                worker.interrupt()

    def abort_update(self) -> None:
        if self._joining:  # those that joined before are not to suffer
            listener = self._listener
            if listener is not None:
                listener.interrupt()
            return
        for worker in list(self._workers.values()):
            worker.interrupt()

    def shutdown(self) -> None:
        deadline = Deadline(_GOODBYE)
        for worker in self._workers.values():
            worker.say_goodbye()
        for worker in self._workers.values():
            try:
                worker.await_goodbye(deadline)
            except TransferTimeoutError:
                logger.warning("%s still maps this trainer's memory, which stays taken until it lets go", worker.peer)
            worker.close()
        self._workers.clear()
        self._stop_listening()
        self._writer.close()
        self._regions.close()

    @property
    def extra_memory(self) -> int:
        return self._writer.extra_memory + self._regions.extra_memory


class IpcWorkerEngine(WeightTransferEngine[IpcInitInfo, IpcUpdateInfo]):
    """Maps the trainer's weights and copies them."""

    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        super().__init__(config, parallel_config)
        self._device = _numbered(parallel_config.device)
        on_gpu = self._device.type == "cuda"
        self._reader = CudaReader(self._device) if on_gpu else HostReader()
        self._regions = CudaRegionReader(self._device) if on_gpu else HostRegionReader()
        self._reading = threading.Lock()
        self._trainers = Trainers()
        self._watch: threading.Thread | None = None
        self._ended = threading.Event()

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        deadline = Deadline(init_info.timeout)
        infos = init_info.of_ranks()
        for number, info in enumerate(infos):
            self._require_one_kind(info.gpu, rank_name(number, len(infos)))
        self.transport = "CUDA IPC" if init_info.gpu else "shared memory"
        rank = init_info.rank_offset + self.parallel_config.rank
        gpu = cuda.uuid_of(self._device.index) if self._device.type == "cuda" else None
        self._trainers.join(infos, rank, gpu, deadline)
        self._watch = threading.Thread(target=self._let_go_in_the_end, name="weight-transfer ipc watch", daemon=True)
        self._watch.start()

    def receive_weights(self, update_info: IpcUpdateInfo, load_weights: LoadWeights) -> None:
        deadline = Deadline(update_info.timeout)
        with self._reading, self._trainers.blamed():
            self._reader.read(update_info, load_weights, self._trainers[0], deadline)

    def receive_regions(self, update_info: IpcUpdateInfo, incoming: IncomingRegions) -> None:
        deadline = Deadline(update_info.timeout)
        with self._reading, self._trainers.blamed():
            self._regions.read(update_info, incoming, self._trainers, deadline)

    def abort_update(self) -> None:
        self._trainers.interrupt()

    def shutdown(self) -> None:
        self._trainers.interrupt()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        self._trainers.close()
        self._close_readers()

    @property
    def lost(self) -> bool:
        return self._ended.is_set()

    @property
    def extra_memory(self) -> int:
        return self._reader.extra_memory + self._regions.extra_memory

    @property
    def mapped_allocations(self) -> int:
        """How many of the trainer's allocations of device memory are mapped now."""
        return self._reader.mapped_allocations + self._regions.mapped_allocations

    def _let_go_in_the_end(self) -> None:
        """Unmap the trainer's memory as soon as one of its ranks shuts down or dies: mapped memory stays taken."""
        self._trainers.await_end()
        self._ended.set()
        if not self._reading.acquire(blocking=False):
            self._trainers.interrupt()  # whoever waits for another rank
            self._reading.acquire()
        try:
            self._close_readers()
        finally:
            self._reading.release()
        self._trainers.interrupt()

    def _close_readers(self) -> None:
        self._reader.close()
        self._regions.close()

    def _require_one_kind(self, gpu: str | None, peer: str) -> None:
        if (gpu is None) is not (self._device.type == "cpu"):
            theirs = "host memory" if gpu is None else "a GPU"
            raise HandshakeError(
                f"The trainer's weights lie in {theirs}, this worker's on {self._device}; ipc connects like with like: "
                "move one side, such as with CheckpointSource(path, device='cuda').",
                backend="ipc",
                phase="init",
                peer=peer,
            )
        if gpu is not None:
            require_reachable(gpu, self._device, peer)


def _numbered(name: str | None) -> torch.device:
    """Return a device with its number."""
    device = torch.device(name or "cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
