"""Weights in the memory of a CUDA device: the agent lives in the engine's process.

Memory that came from another process by a CUDA IPC handle cannot be exported once more, so a process of its own could
not serve them. What `weight_transfer_rdma.process` contains can therefore happen here: a NIXL call that never returns
costs a thread, and one that aborts costs the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from weight_transfer.authoring import SharedMemory
from weight_transfer.errors import BackendUnavailableError, TransferError, TransferTimeoutError
from weight_transfer_rdma.memory import Arena, Located
from weight_transfer_rdma.nixl import VRAM, WHOLE, Agent, Place, Transport, environment, installed, transport_in
from weight_transfer_rdma.plan import Regions
from weight_transfer_rdma.process import foreign
from weight_transfer_rdma.runs import Runs

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer_rdma.config import RdmaOptions
    from weight_transfer_rdma.nixl import Rows

_BLOCK = 512  # bytes; blocks of torch's CUDA allocator begin at multiples of it
_KILL_TIMEOUT = 30.0  # seconds for a call of NIXL that is under way


class LocalAgent:
    """NIXL in this process, with the methods of `AgentProcess`.

    A worker's agent, which reads, has no progress thread: with one, UCX learns of the end of a copy 15 to 20 ms late.

    `kill` destroys the agent, which ends what it has under way; if a call of NIXL does not return, it raises.

    Args:
        name: of the agent.
        options: of the backend.
        peer: how errors call the other side of its transfers.
        reads: whether it reads, or is read from.
    """

    def __init__(self, name: str, options: RdmaOptions, peer: str, reads: bool) -> None:
        module = installed()
        if module is None:
            raise BackendUnavailableError("NIXL is not installed: pip install nixl-cu12", name="rdma")
        self.name = name
        self._peer = peer
        self._killed = threading.Event()
        self._busy = threading.Lock()
        self._labels: dict[str, str] = {}
        self._log = _log_file()
        with self._calling("start"), _variables(options, self._log):
            self._agent: Agent | None = Agent(name, module, progress=not reads)
        self._runs: Runs | None = Runs(self._agent)

    @property
    def alive(self) -> bool:
        return not self._killed.is_set()

    def register(self, address: int, nbytes: int, place: Place) -> None:
        """See `Agent.register`."""
        with self._calling("register") as agent:
            agent.register(address, nbytes, place)

    def deregister(self, address: int) -> None:
        """See `Agent.deregister`."""
        with self._calling("deregister") as agent:
            agent.deregister(address)

    def metadata(self, _deadline: Deadline) -> bytes:
        with self._calling("metadata") as agent:
            return agent.metadata()

    def connect(
        self, metadata: bytes, _deadline: Deadline, replaced: str | None = None, label: str | None = None
    ) -> str:
        with self._calling("connect", label) as agent:
            peer = agent.connect(metadata, replaced)
        self._labels[peer] = label or self._peer
        return peer

    def prepare(
        self,
        operation: str,
        peer: str,
        rows: Rows,
        local: Place,
        remote: Place,
        _deadline: Deadline,
        plan: str = WHOLE,
    ) -> int:
        with self._calling("prepare", self._labels.get(peer)) as agent:
            return agent.prepare(operation, peer, rows, local, remote, plan)

    def release(self, _deadline: Deadline, plan: str = WHOLE) -> None:
        with self._calling("release") as agent:
            agent.release(plan)

    def attach_flags(self, peer: str, filled: int, loaded: int, _deadline: Deadline, plan: str = WHOLE) -> None:
        with self._calling("attach_flags", self._labels.get(peer)) as agent:
            agent.attach_flags(peer, filled, loaded, plan)

    def start(self, handle: int, bucket: int, deadline: Deadline) -> None:
        with self._moving() as runs:
            runs.start(handle, bucket)
            while runs.advance():
                pass

    def finish(self, deadline: Deadline) -> None:
        with self._moving() as runs:

            def has_ended() -> bool:
                while runs.advance():
                    pass
                if runs.take():
                    return True
                if self._killed.is_set():
                    raise TransferError("The transfer was stopped.", backend="rdma")
                return False

            try:
                deadline.wait_for(has_ended, "moving weights", backend="rdma")
            except TransferTimeoutError as error:
                error.peer = self._labels.get(runs.peer, self._peer)  # whose reads have not ended by now
                raise

    def transport(self, place: Place) -> Transport:
        ctypes.CDLL(None).fflush(None)  # UCX leaves what it logs in its buffer
        with open(self._log, errors="replace") as log:
            return transport_in(log.read(), place)

    def kill(self) -> None:
        self._killed.set()
        if not self._busy.acquire(timeout=_KILL_TIMEOUT):
            raise TransferTimeoutError(
                "A call of NIXL does not return; this process must be restarted before its weights are used.",
                backend="rdma",
                peer=self._peer,
            )
        try:
            self._agent = self._runs = None  # its destructor ends what is under way
        finally:
            self._busy.release()

    def close(self) -> None:
        self.kill()

    @contextmanager
    def _moving(self) -> Iterator[Runs]:
        """Hold the agent for one call about transfers under way."""
        what = "moving weights"
        with self._busy:
            self._require_alive()
            runs = self._runs
            assert runs is not None
            try:
                yield runs
            except TransferError:
                raise
            except Exception as error:
                peer = self._labels.get(runs.peer, self._peer)
                raise foreign(type(error).__name__, str(error), what, peer) from error

    @contextmanager
    def _calling(self, what: str, label: str | None = None) -> Iterator[Agent]:
        """Hold the agent for one call, and map what it raises."""
        with self._busy:
            self._require_alive()
            try:
                yield getattr(self, "_agent", None)  # type: ignore[misc]  # it is missing while it is being made
            except (TransferError, BackendUnavailableError):
                raise
            except Exception as error:
                raise foreign(type(error).__name__, str(error), what, label or self._peer) from error

    def _require_alive(self) -> None:
        if self._killed.is_set():
            raise TransferError("The transfer was stopped.", backend="rdma")


class DeviceMemory:
    """A `Memory` on one CUDA device; weights stay where they are.

    What is registered are whole segments of torch's allocator, each once: of regions that overlap, NIXL may not find
    the one in which a range lies.
    """

    def __init__(self, options: RdmaOptions, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.place = Place(VRAM, self._device.index)
        self._options = options
        self._agent: LocalAgent | None = None
        self._registered: dict[int, int] = {}
        self._arenas: list[torch.Tensor] = []
        self._known: dict[str, tuple[tuple[object, ...], Located]] = {}
        self.moved = False  # CUDA memory stays where it is

    def start_agent(self, name: str, peer: str, reads: bool, deadline: Deadline) -> LocalAgent:
        self._known.clear()
        self._registered.clear()
        self._arenas.clear()
        self._agent = LocalAgent(name, self._options, peer, reads)
        return self._agent

    def locate(
        self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], deadline: Deadline, plan: str = WHOLE
    ) -> Located:
        given = [tensors.get(param.name) for param in manifest.params]
        signature = (
            manifest.digest,
            [(tensor.data_ptr(), tensor.is_contiguous()) if tensor is not None else None for tensor in given],
        )
        known = self._known.pop(plan, None)
        if known is None or known[0] != signature:
            known = signature, self._located(given)
        self._known[plan] = known
        return known[1]

    @property
    def parted(self) -> bool:
        return False  # CUDA memory is no child's

    def arena(self, nbytes: int, deadline: Deadline) -> Arena:
        data = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        self.settle()
        self._arenas.append(data)
        segments = self._segments()
        home = _home(segments, data)
        self._register({int(segments.addresses[home]): int(segments.sizes[home])} if home >= 0 else _span(data))
        return Arena(data, data.data_ptr())

    def free(self, arena: Arena, deadline: Deadline) -> None:
        self._arenas = [data for data in self._arenas if data is not arena.data]  # its segment may hold weights, too

    def words(self, nbytes: int, deadline: Deadline) -> Arena:
        assert self._agent is not None
        data = SharedMemory(nbytes).storage(0, nbytes)
        self._agent.register(data.data_ptr(), nbytes, Place())
        return Arena(data, data.data_ptr())

    def settle(self) -> None:
        torch.cuda.synchronize(self._device.index)

    def settle_copies(self) -> None:
        torch.cuda.current_stream(self._device.index).synchronize()  # reads for the next buckets go on beside it

    def close(self) -> None:
        self._agent = None
        self._known.clear()
        self._arenas.clear()

    def _located(self, tensors: list[torch.Tensor | None]) -> Located:
        """Register the allocator's segments in which tensors lie, and take back those of no plan and no arena."""
        segments = self._segments()
        addresses = np.full(len(tensors), -1, dtype=np.int64)
        padding = np.zeros(len(tensors), dtype=np.int64)
        used: dict[int, int] = {}
        for index, tensor in enumerate(tensors):
            if tensor is None or tensor.device != self._device or not tensor.is_contiguous() or not tensor.numel():
                continue
            if tensor.is_conj() or tensor.is_neg():
                continue  # its bytes are not its values
            home = _home(segments, tensor)
            if home < 0:
                continue  # not from torch's allocator: it goes through the buckets
            addresses[index] = start = tensor.data_ptr()
            storage = tensor.untyped_storage()
            if storage.resizable() and storage.data_ptr() + storage.nbytes() == start + tensor.nbytes:
                padding[index] = -(start + tensor.nbytes) % _BLOCK
            used[int(segments.addresses[home])] = int(segments.sizes[home])
        others = [located.regions for _, located in self._known.values()]
        kept = {int(each): int(size) for own in others for each, size in zip(own.addresses, own.sizes, strict=True)}
        kept |= used
        for arena in self._arenas:
            home = _home(segments, arena)
            kept |= {int(segments.addresses[home]): int(segments.sizes[home])} if home >= 0 else _span(arena)
        self._register(kept, only=True)
        return Located(addresses, padding, Regions.of(list(used.items())))

    def _segments(self) -> Regions:
        """Return the segments of torch's allocator on the device."""
        return Regions.of(
            [
                (int(segment["address"]), int(segment["total_size"]))
                for segment in torch.cuda.memory_snapshot()
                if segment["device"] == self._device.index
            ]
        )

    def _register(self, regions: dict[int, int], only: bool = False) -> None:
        """Register regions, address and bytes each; with ``only``, take back all others."""
        assert self._agent is not None
        for address, size in list(self._registered.items()):
            if regions.get(address, 0 if only else size) != size:
                self._agent.deregister(address)
                del self._registered[address]
        for address in regions.keys() - self._registered.keys():
            self._agent.register(address, regions[address], self.place)
            self._registered[address] = regions[address]


def _home(segments: Regions, tensor: torch.Tensor) -> int:
    """Return the index of the segment in which a contiguous tensor lies, -1 if in none."""
    start = tensor.data_ptr()
    home = int(np.searchsorted(segments.addresses, start, side="right")) - 1
    if home < 0 or start + tensor.nbytes > segments.addresses[home] + segments.sizes[home]:
        return -1
    return home


def _span(tensor: torch.Tensor) -> dict[int, int]:
    return {tensor.data_ptr(): tensor.nbytes}


@cache
def _log_file() -> str:
    """Return the file into which UCX logs in this process; UCX reads its name once, when it is loaded."""
    return f"/proc/self/fd/{os.memfd_create('weight-transfer-agent-log', os.MFD_CLOEXEC)}"


@contextmanager
def _variables(options: RdmaOptions, log: str) -> Iterator[None]:
    """Set UCX's environment variables while an agent is made."""
    before = dict(os.environ)
    os.environ.update(environment(options.transport, options.interface, options.ucx) | {"UCX_LOG_FILE": log})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
