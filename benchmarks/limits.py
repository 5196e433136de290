"""What bounds an update by region: the same bytes, moved by what each backend is built on, and nothing around it.

A limit has two sides, on each trainer rank and each worker. `offer` makes a trainer rank's side ready and says what the
workers need; `join` is called on all of both at the same time; then each `run` moves all bytes once, on all at the same
time, and returns the wall time and the thread's CPU time that it took here, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import weight_transfer as wt
from weight_transfer.values.deadline import Deadline

GIB = 2**30
LONG = 120.0  # seconds
Seconds = tuple[float, float]


def settle(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> Seconds:
    """Return the wall time and the thread's CPU time of a call, until the device has done all of it.

    A GPU does it once before: one that has rested begins slowly.
    """
    if device.type == "cuda":
        call()
    settle(device)
    since, cpu = time.perf_counter(), time.thread_time()
    call()
    settle(device)
    return time.perf_counter() - since, time.thread_time() - cpu


class Limit:
    """One side of a limit.

    Args:
        device: of this process's weights.
        sizes: on a worker the bytes that it takes from each trainer rank, on a trainer rank those that it gives each
            worker.
        devices: of the trainer's ranks.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int], devices: Sequence[torch.device]) -> None:
        self.device = device
        self.sizes = sizes
        self.devices = devices

    def offer(self) -> Any:
        return None

    def join(self, offers: Sequence[Any]) -> None:
        pass

    def run(self) -> Seconds:
        return 0.0, 0.0

    def close(self) -> None:
        pass


class CopyLimit(Limit):
    """The limit of ``ipc`` on CPUs: one contiguous copy by each worker, of as many bytes as it keeps."""

    def join(self, offers: Sequence[Any]) -> None:
        self._source = torch.ones(sum(self.sizes), dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)

    def run(self) -> Seconds:
        return timed(lambda: self._target.copy_(self._source), self.device)


class SideBySideLimit(Limit):
    """The limit of ``ipc`` on GPUs: each worker copies on its own GPU and reads from the others, side by side.

    Source and target are contiguous blocks of up to 2 GiB, copied again and again. A peer is read by the worker's copy
    engines, where the driver has batches of copies, and by torch's own copy; the faster way counts.
    """

    def join(self, offers: Sequence[Any]) -> None:
        self._lanes: list[tuple[Any, torch.Tensor, torch.Tensor, int]] = []
        for nbytes, there in zip(self.sizes, self.devices, strict=True):
            block = max(min(nbytes, 2 * GIB), 1)
            source = torch.ones(block, dtype=torch.uint8, device=there)
            target = torch.zeros(block, dtype=torch.uint8, device=self.device)
            target.copy_(source)
            settle(there)
            self._lanes.append((torch.cuda.Stream(self.device), source, target, nbytes))

    def run(self) -> Seconds:
        return min(timed(partial(self._run, by_engines), self.device) for by_engines in (False, True))

    def _run(self, by_engines: bool) -> None:
        for lane, source, target, nbytes in sorted(self._lanes, key=lambda it: it[1].device == self.device):
            for start in range(0, nbytes, len(source)):
                self._copy(source, target, min(nbytes - start, len(source)), lane, by_engines)
        for lane, *_ in self._lanes:
            lane.synchronize()

    def _copy(
        self, source: torch.Tensor, target: torch.Tensor, nbytes: int, lane: torch.cuda.Stream, by_engines: bool
    ) -> None:
        from weight_transfer_ipc import cuda

        if by_engines and source.device != self.device and cuda.has_batches():
            batch = cuda.Batch([source.data_ptr()], [target.data_ptr()], [nbytes])
            assert self.device.index is not None
            batch.run(lane.cuda_stream, self.device.index)
        else:
            with torch.cuda.stream(lane):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)

    def close(self) -> None:
        self._lanes = []


class GroupLimit(Limit):
    """The limit of ``nccl``: sends and receives, grouped, over a communicator of its own; gloo on CPUs.

    On GPUs a block of 1 GiB for all partners together goes again and again.

    Args:
        member: of this process: trainer ranks come first.
        meeting: where the members meet.
    """

    def __init__(self, *common: Any, member: int, meeting: Any) -> None:
        super().__init__(*common)
        self._member = member
        self._first = len(self.devices) if member < len(self.devices) else 0
        self._meeting = meeting

    def join(self, offers: Sequence[Any]) -> None:
        from weight_transfer_nccl.group import Group

        trainers, workers = len(self.devices), offers[0]
        self._group = Group(self._meeting, self._member, trainers + workers, self.device, trainers=trainers)
        self._group.join(Deadline(LONG), str)
        self._peers = [(self._first + number, nbytes) for number, nbytes in enumerate(self.sizes)]
        partners = max(trainers, workers)  # the same on both sides
        self._block = GIB // partners if self.device.type == "cuda" else 2**62  # bytes
        own = max(min(self._block, max(self.sizes)), 1)
        self._buffers = [torch.ones(own, dtype=torch.uint8, device=self.device) for _ in self._peers]

    def offer(self) -> int:
        """Say how many workers there are."""
        return len(self.sizes)

    def run(self) -> Seconds:
        self._group.begin_with([peer for peer, _ in self._peers], Deadline(LONG)).wait()
        return timed(self._exchange, self.device)

    def _exchange(self) -> None:
        works = []
        for start in range(0, max(self.sizes), self._block):
            parcels = [
                (peer, buffer[: min(self._block, nbytes - start)])
                for (peer, nbytes), buffer in zip(self._peers, self._buffers, strict=True)
                if start < nbytes
            ]
            works.append(self._group.exchange(parcels, Deadline(LONG)))
        for work in works:
            work.wait()

    def close(self) -> None:
        self._group.abort()
        self._buffers = []


class ReadLimit(Limit):
    """The limit of ``rdma``: each worker reads one block of each trainer rank with NIXL, one descriptor each, at once.

    Agents, and what they have registered, stay until the process ends.
    """

    def __init__(self, *common: Any, name: str, config: Any) -> None:
        from weight_transfer_rdma.memory import memory_for

        super().__init__(*common)
        self._name = name
        self._memory = memory_for(str(self.device), wt.load_config(config).options)

    def _start(self, nbytes: int, reads: bool) -> None:
        deadline = Deadline(LONG)
        self._agent = self._memory.start_agent(f"limit-{self._name}", "peer", reads, deadline)
        self._arena = self._memory.arena(max(nbytes, 1), deadline)

    def offer(self) -> Any:
        """Start a trainer rank's agent; return how it is reached, and where its block lies."""
        self._start(max(self.sizes), reads=False)
        self._arena.data.fill_(7)
        self._memory.settle()
        place = self._memory.place
        return self._agent.metadata(Deadline(LONG)), self._arena.address, (place.memory, place.device)

    def join(self, offers: Sequence[Any]) -> None:
        if hasattr(self, "_agent"):  # a trainer rank
            return
        from weight_transfer_rdma.nixl import Place

        self._start(sum(self.sizes), reads=True)
        self._deadline, at, self._handles = Deadline(1e6), self._arena.address, []
        for (metadata, address, place), nbytes in zip(offers, self.sizes, strict=True):
            if nbytes:
                peer = self._agent.connect(metadata, self._deadline)
                rows = np.array([[at, address, nbytes]], dtype=np.uint64)
                here, there = self._memory.place, Place(*place)
                self._handles.append(self._agent.prepare("READ", peer, rows, here, there, self._deadline))
            at += nbytes
        self.run()
        if not bool((self._arena.data[: sum(self.sizes)] == 7).all()):
            raise SystemExit("raw reads brought other bytes")

    def run(self) -> Seconds:
        return timed(self._read, self.device) if hasattr(self, "_handles") else (0.0, 0.0)

    def _read(self) -> None:
        for handle in self._handles:
            self._agent.start(handle, 0, self._deadline)
        for _ in self._handles:
            self._agent.finish(self._deadline)
