"""A trainer rank's shards in host memory: exported as shared memory, whose descriptors go over the sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import Exporter, companions_of
from weight_transfer.errors import PeerLostError
from weight_transfer_ipc.host_segments import Passing
from weight_transfer_ipc.region_writer import RegionWriter
from weight_transfer_ipc.ring import RING, RingLayout, RingWriter

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Export, Manifest, OutgoingRegions, WeightTransferConfig
    from weight_transfer_ipc.blocks import Blocks
    from weight_transfer_ipc.connection import Connection
    from weight_transfer_ipc.shares import Share, TakenShards


class HostRegionWriter(RegionWriter):
    """Shares host memory.

    Args:
        config: the trainer's.
    """

    def __init__(self, config: WeightTransferConfig) -> None:
        super().__init__(config)
        self._exporter = Exporter(adopt=config.options.export == "adopt")
        self._passing = Passing()
        self._ring: RingWriter | None = None

    @property
    def extra_memory(self) -> int:
        return self._ring.layout.nbytes if self._ring is not None else 0

    def welcome(self, rank: int) -> None:
        self._passing.welcome(rank)

    def send(
        self,
        outgoing: OutgoingRegions,
        workers: dict[int, Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Let those workers that take something have the segments, too. Workers that died leave ``workers``."""
        assert self._share is not None
        fds = {segment.id: self._exporter.segment(segment.id).fd for segment in self._share.export.segments}
        if self._share.ring is not None and self._ring is not None:
            fds[RING] = self._ring.memory.fd
        for taker in outgoing.takers:
            worker = workers.get(taker.worker + 1)
            if worker is None or not len(taker.pieces):
                continue
            try:
                self._passing.bring(taker.worker + 1, worker, fds, deadline)
            except PeerLostError:  # the worker's own answer will say so; the others go on
                workers.pop(taker.worker + 1).close()
        super().send(outgoing, workers, deadline, progress)

    def close(self) -> None:
        self._exporter.close()
        self._passing.clear()
        self._forget()
        self._ring = None

    def _refreshed(self, taken: TakenShards) -> Export:
        if self._export is not None and not self._exporter.parted and not self._exporter.moved:
            return self._export
        tensors = taken.tensors
        return self._exporter.refresh(taken.manifest, tensors, lambda: companions_of(tensors.values()))

    def _described(self, share: Share) -> Share:
        return share

    def _ring_for(self, staged: Manifest) -> RingLayout | None:
        if not staged.params:
            return None
        self._ring = self._ring or RingWriter(RingLayout(self._config.bucket_bytes, self._config.buckets))
        return self._ring.layout

    def _write(
        self,
        blocks: Blocks,
        tensors: Sequence[Any],
        readers: Sequence[Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        assert self._ring is not None
        self._ring.write(blocks.plan, blocks.of_shards(tensors, self._staged), readers, deadline, progress)
