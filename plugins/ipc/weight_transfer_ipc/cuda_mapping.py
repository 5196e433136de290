"""A trainer rank's device memory, mapped by a worker, and when it may be read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.errors import HandshakeError, TransferError
from weight_transfer_ipc import cuda
from weight_transfer_ipc.cuda_ring import POLL
from weight_transfer_ipc.device_memory import bytes_at
from weight_transfer_ipc.infos import Allocation

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.infos import DeviceMemory


@attrs.define
class Mapped:
    """An allocation of the trainer, mapped here. ``opened`` is False in the trainer's own process."""

    allocation: Allocation
    address: int
    memory: torch.Tensor
    opened: bool


class Mappings:
    """What one process maps of another one's device memory.

    Args:
        device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[int, Mapped] = {}
        self._ready: dict[str, Any] = {}

    @property
    def memory(self) -> Mapping[int, torch.Tensor]:
        """The bytes of each allocation, by its id, uint8 ``[nbytes]``, on the worker's device."""
        return {key: mapped.memory for key, mapped in self._mapped.items()}

    @property
    def gpus(self) -> Mapping[int, str]:
        """The UUID of the GPU on which each allocation lies, by the allocation's id."""
        return {key: mapped.allocation.gpu for key, mapped in self._mapped.items()}

    def refresh(self, memory: DeviceMemory, trainer: Connection, deadline: Deadline) -> None:
        """Map what is new, and unmap what is gone. Nothing may be under way.

        Raises:
            HandshakeError: the memory cannot be mapped.
        """
        wanted = {allocation.id: allocation for allocation in memory.allocations}
        self._unmap([key for key, mapped in self._mapped.items() if wanted.get(key) != mapped.allocation])
        same_process = trainer.pid == os.getpid()
        for allocation in memory.allocations:
            deadline.check("mapping the trainer's memory", backend="ipc", phase="update")
            if allocation.id not in self._mapped:
                self._mapped[allocation.id] = self._open(allocation, same_process, trainer.peer)
        if same_process:
            self._ready = dict.fromkeys(memory.ready)
        else:
            events = {gpu: bytes.fromhex(handle) for gpu, handle in memory.ready.items()}
            self._ready = {gpu: torch.cuda.Event.from_ipc_handle(self._device, e) for gpu, e in events.items()}

    def await_ready(self, trainer: Connection, deadline: Deadline) -> None:
        """Wait, on the host, until the trainer's streams have come to where `send` was called.

        The stream does not wait for the event itself: if the trainer died before it happened, the stream would never
        drain, and the deadline could not be kept.
        """
        for gpu, event in self._ready.items():
            if event is None:
                torch.cuda.synchronize(cuda.find(gpu))
                continue
            while not event.query():
                deadline.check("waiting for the trainer's stream", backend="ipc", phase="update", peer=trainer.peer)
                trainer.check_alive()
                time.sleep(POLL)

    def forget_events(self) -> None:
        """Let go of what says when the memory may be read."""
        self._ready = {}

    def close(self) -> None:
        """Unmap everything. Nothing may be under way."""
        self.forget_events()
        self._unmap(list(self._mapped))

    def _open(self, allocation: Allocation, same_process: bool, peer: str) -> Mapped:
        if same_process:
            address, index = allocation.address, cuda.find(allocation.gpu)
            assert index is not None  # this process exported it
            memory = bytes_at(address, allocation.nbytes, torch.device("cuda", index))
            return Mapped(allocation, address, memory, opened=False)
        try:
            address = cuda.open_handle(allocation.handle, self._device.index)
        except TransferError as error:
            raise HandshakeError(
                f"{self._device} cannot map the trainer's memory; CUDA IPC needs both in one IPC and PID namespace "
                "(docker run --ipc and --pid), and peer access between two GPUs. Or use the nccl backend.",
                backend="ipc",
                phase="update",
                peer=peer,
                cause=error.cause,
            ) from error
        return Mapped(allocation, address, bytes_at(address, allocation.nbytes, self._device), opened=True)

    def _unmap(self, keys: Iterable[int]) -> None:
        for key in keys:
            mapped = self._mapped.pop(key)
            if mapped.opened:
                cuda.close_handle(mapped.address, self._device.index)


def finish(lanes: Iterable[torch.cuda.Stream], deadline: Deadline) -> None:
    """Wait, on the host, until the streams have come to where they are now."""
    for end in [lane.record_event() for lane in lanes]:
        deadline.wait_for(end.query, "copying from the trainer's memory", backend="ipc", phase="update")
