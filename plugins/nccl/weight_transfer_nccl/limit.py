"""What bounds NCCL and gloo: blocks that go over a communicator of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weight_transfer.authoring import Deadline, Limit, LimitSide, structure, timed, unstructure
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.meeting_place import MeetingPlace
from weight_transfer_nccl.rendezvous import Rendezvous

_GIB = 2**30
_LONG = 120.0  # seconds


def limit(side: LimitSide) -> Limit:
    """Return this process's side: a broadcast if all workers take the same, else sends and receives, grouped."""
    return BroadcastLimit(side) if side.alike else ExchangeLimit(side)


def broadcast_again(group: Group, buffer: torch.Tensor, nbytes: int) -> None:
    """Broadcast a buffer again and again until so many bytes have gone; all members call it at the same time."""
    size = buffer.nbytes
    deadline = Deadline(_LONG)
    works = [group.broadcast([buffer[: min(size, nbytes - at)]], deadline) for at in range(0, nbytes, size)]
    for work in works:
        work.wait()


class GroupLimit(Limit):
    """A limit over a communicator in which the trainer's ranks come first."""

    def offer(self) -> dict[str, Any] | None:
        """Open the meeting place, on rank 0, and say where it is, and how many workers there are."""
        if self.side.member:
            return None
        trainers, workers = len(self.side.trainers), len(self.side.sizes)
        self._place = MeetingPlace("127.0.0.1", 0, trainers + workers)
        meeting = self._place.meeting("nccl" if self.side.device.type == "cuda" else "gloo")
        return {"meeting": unstructure(meeting), "workers": workers}

    def join(self, offers: Sequence[Any]) -> None:
        self._meeting: Rendezvous = structure(offers[0]["meeting"], Rendezvous, "offer of rank 0")
        self._trainers, self._workers = len(self.side.trainers), offers[0]["workers"]
        members = self._trainers + self._workers
        self._group = Group(self._meeting, self.side.member, members, self.side.device, trainers=self._trainers)
        self._group.join(Deadline(_LONG), str)

    def _block(self, nbytes: int) -> torch.Tensor:
        return torch.ones(max(nbytes, 1), dtype=torch.uint8, device=self.side.device)

    def close(self) -> None:
        self._group.abort()
        if not self.side.member:
            self._place.close()


class BroadcastLimit(GroupLimit):
    """One buffer is broadcast: 1 GiB again and again on GPUs, all bytes at once in host memory."""

    what = "a broadcast of contiguous blocks over a communicator of its own"

    def join(self, offers: Sequence[Any]) -> None:
        super().join(offers)
        self._nbytes = max(self.side.sizes)
        self._buffer = self._block(min(_GIB, self._nbytes) if self.side.device.type == "cuda" else self._nbytes)

    def run(self) -> tuple[float, float]:
        self._group.begin(Deadline(_LONG)).wait()
        return timed(lambda: broadcast_again(self._group, self._buffer, self._nbytes), self.side.device)


class ExchangeLimit(GroupLimit):
    """Sends and receives, grouped; on GPUs a block of 1 GiB for all partners together goes again and again."""

    what = "grouped sends and receives of contiguous blocks over a communicator of its own"

    def join(self, offers: Sequence[Any]) -> None:
        super().join(offers)
        first = self._trainers if self.side.is_trainer else 0
        self._peers = [(first + number, nbytes) for number, nbytes in enumerate(self.side.sizes)]
        partners = max(self._trainers, self._workers)  # the same on both sides
        self._most = _GIB // partners if self.side.device.type == "cuda" else 2**62  # bytes
        self._buffers = [self._block(min(self._most, max(self.side.sizes))) for _ in self._peers]

    def run(self) -> tuple[float, float]:
        self._group.begin_with([peer for peer, _ in self._peers], Deadline(_LONG)).wait()
        return timed(self._exchange, self.side.device)

    def _exchange(self) -> None:
        works = []
        for start in range(0, max(self.side.sizes), self._most):
            parcels = [
                (peer, buffer[: min(self._most, nbytes - start)])
                for (peer, nbytes), buffer in zip(self._peers, self._buffers, strict=True)
                if start < nbytes
            ]
            works.append(self._group.exchange(parcels, Deadline(_LONG)))
        for work in works:
            work.wait()
