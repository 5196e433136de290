"""What bounds one-sided reads: one of a contiguous block, from each trainer rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from weight_transfer.authoring import Deadline, Limit, LimitSide, timed
from weight_transfer.errors import TransferError
from weight_transfer_rdma.memory import memory_for
from weight_transfer_rdma.nixl import Place, Rows

_LONG = 120.0  # seconds
_MARK = 7


def limit(side: LimitSide) -> Limit:
    """Return this process's side."""
    return ReadLimit(side)


class ReadLimit(Limit):
    """Each worker reads one block of each trainer rank with NIXL, one descriptor each, at once.

    Agents, and what they have registered, stay until the process ends.
    """

    what = "one NIXL read of a contiguous block from each trainer rank, by all workers at once"
    reads = True  # its agents are for reads, as those of engines

    def __init__(self, side: LimitSide) -> None:
        super().__init__(side)
        self._memory = memory_for(str(side.device), side.config.options)

    def _start(self, nbytes: int, reads: bool) -> None:
        deadline = Deadline(_LONG)
        name = f"{type(self).__name__}-{self.side.member}"
        self._agent = self._memory.start_agent(name, "peer", reads and self.reads, deadline)
        self._arena = self._memory.arena(max(self.room(nbytes), 1), deadline)

    def room(self, nbytes: int) -> int:
        """Return the bytes of memory that is needed to give or take so many."""
        return nbytes

    def rows(self, here: int, there: int, nbytes: int) -> Rows:
        """Return the descriptors of a read: for each its address here, that of the peer, and bytes."""
        return np.array([[here, there, nbytes]], dtype=np.uint64)

    def offer(self) -> dict[str, Any]:
        """Start a trainer rank's agent; say how it is reached, and where its block lies."""
        self._start(max(self.side.sizes), reads=False)
        self._arena.data.fill_(_MARK)
        self._memory.settle()
        place = self._memory.place
        metadata = self._agent.metadata(Deadline(_LONG)).hex()
        return {"metadata": metadata, "address": self._arena.address, "place": [place.memory, place.device]}

    def join(self, offers: Sequence[Any]) -> None:
        if self.side.is_trainer:
            return
        nbytes = sum(self.side.sizes)
        self._start(nbytes, reads=True)
        self._deadline, at, self._handles = Deadline(1e6), self._arena.address, []
        read: list[tuple[int, int]] = []
        for offer, size in zip(offers, self.side.sizes, strict=True):
            if size:
                peer = self._agent.connect(bytes.fromhex(offer["metadata"]), self._deadline)
                rows = self.rows(at, offer["address"], size)
                read += [(int(row[0]) - self._arena.address, int(row[2])) for row in rows]
                here, there = self._memory.place, Place(*offer["place"])
                self._handles.append(self._agent.prepare("READ", peer, rows, here, there, self._deadline))
            at += size
        self.run()
        if not all(bool((self._arena.data[start : start + size] == _MARK).all()) for start, size in read):
            raise TransferError("The limit's raw reads brought other bytes.", backend="rdma")

    def run(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.side.is_trainer else timed(self._read, self.side.device)

    def _read(self) -> None:
        for handle in self._handles:
            self._agent.start(handle, 0, self._deadline)
        for _ in self._handles:
            self._agent.finish(self._deadline)
