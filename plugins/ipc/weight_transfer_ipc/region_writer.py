"""A trainer rank's side of updates by region: it says where its shards lie, and sends the others through the ring.

Host memory and GPU memory differ in how they are exported and in the ring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import Manifest
from weight_transfer_ipc.blocks import Blocks
from weight_transfer_ipc.shares import Share, TakenShards

if TYPE_CHECKING:
    from weight_transfer.authoring import (
        Deadline,
        Export,
        OutgoingRegions,
        WeightTransferConfig,
    )
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.ring import RingLayout


class RegionWriter(ABC):
    """Shares update after update from the same memory.

    Args:
        config: the trainer's.
    """

    def __init__(self, config: WeightTransferConfig) -> None:
        self._config = config
        self._outgoing: OutgoingRegions | None = None
        self._taken: TakenShards | None = None
        self._export: Export | None = None
        self._staged: tuple[int, ...] = ()
        self._layout: RingLayout | None = None
        self._blocks: Blocks | None = None
        self._share: Share | None = None
        self._wire: dict[str, Any] = {}

    def share(self, outgoing: OutgoingRegions) -> dict[str, Any]:
        """Return what the workers are told; the same object while it is unchanged."""
        if outgoing is not self._outgoing:
            self._taken, self._outgoing, self._export = TakenShards.of(outgoing), outgoing, None
        assert self._taken is not None
        export = self._refreshed(self._taken)
        if export is not self._export:
            self._export = export
            self._stage(self._taken, export)
        share = self._described(Share(export=export, staged=self._staged, ring=self._layout))
        if share != self._share:
            self._share, self._wire = share, share.to_wire()
        return self._wire

    def send(
        self,
        outgoing: OutgoingRegions,
        workers: dict[int, Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Send what is staged to those that take some of it; the workers fetch the rest by themselves."""
        if self._blocks is None:
            return
        assert self._taken is not None
        staged = set(self._staged)
        takers = [t for t in outgoing.takers if not staged.isdisjoint(t.pieces.shard.tolist())]
        readers = [workers[t.worker + 1] for t in takers if t.worker + 1 in workers]
        if readers:
            self._write(self._blocks, self._taken.of_numbers(self._staged), readers, deadline, progress)

    def welcome(self, rank: int) -> None:  # noqa: B027  (only host memory has something to do)
        """A worker has joined: it knows nothing yet."""

    def release(self) -> None:  # noqa: B027
        """Every worker has finished an update."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""

    @property
    @abstractmethod
    def extra_memory(self) -> int:
        """Bytes of the ring."""

    def _forget(self) -> None:
        self._outgoing = self._taken = self._export = self._layout = self._blocks = self._share = None
        self._staged = ()

    def _stage(self, taken: TakenShards, export: Export) -> None:
        self._staged = taken.staged(export)
        layout = self._layout = self._ring_for(Manifest(taken.manifest.params[number] for number in self._staged))
        self._blocks = Blocks.of(taken.manifest, self._staged, layout.bucket_bytes) if layout is not None else None

    @abstractmethod
    def _refreshed(self, taken: TakenShards) -> Export:
        """Return where the shards are now; the same object while nothing moved."""

    @abstractmethod
    def _described(self, share: Share) -> Share:
        """Return a share with what the kind of memory adds."""

    @abstractmethod
    def _ring_for(self, staged: Manifest) -> RingLayout | None:
        """Have a ring for shards, and return its layout; None if there are none."""

    @abstractmethod
    def _write(
        self,
        blocks: Blocks,
        tensors: Sequence[Any],
        readers: Sequence[Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Send blocks of the staged tensors through the ring."""
