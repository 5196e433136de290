"""The trainer's weights in host memory: exported as shared memory, whose descriptors go over the sockets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import Export, Exporter, plan_buckets, staged_tensors
from weight_transfer.errors import PeerLostError
from weight_transfer_ipc.host_segments import Passing
from weight_transfer_ipc.ring import RING, RingLayout, RingWriter

if TYPE_CHECKING:
    from weight_transfer.authoring import BucketPlan, Deadline, Manifest, WeightSource, WeightTransferConfig
    from weight_transfer_ipc.connection import Connection


class HostWriter:
    """Exports update after update from the same segments."""

    def __init__(self, config: WeightTransferConfig) -> None:
        self._layout = RingLayout(config.bucket_bytes, config.buckets)
        self._exporter = Exporter(adopt=config.options.export == "adopt")
        self._described: tuple[object, object, object] = (None, None, None)
        self._export: Export | None = None
        self._staged: Manifest | None = None
        self._plan: BucketPlan | None = None
        self._ring: RingWriter | None = None
        self._passing = Passing()

    @property
    def extra_memory(self) -> int:
        """Bytes of the ring."""
        return self._ring.layout.nbytes if self._ring is not None else 0

    @property
    def tolerates_moves(self) -> bool:
        """Whether workers alone read the weights, out of memory that is kept for them."""
        return self._staged is not None and not self._staged.params

    def welcome(self, rank: int, _gpu: object) -> None:
        """A worker has joined: it has no segment yet."""
        self._passing.welcome(rank)

    def describe(self, source: WeightSource, manifest: Manifest) -> dict[str, Any]:
        """Return the fields of the update info."""
        masters, resident = source.masters(), source.resident()
        described = manifest, resident, masters
        export = self._export
        if export is None or self._exporter.parted or not all(map(operator.is_, described, self._described)):
            export = self._exporter.refresh(manifest, {**resident, **masters} if masters else resident)
            self._described = (None, None, None) if self._exporter.moved else described
        if export is not self._export:
            self._export, self._staged = export, export.staged(manifest)
            self._plan = plan_buckets(self._staged.params, self._layout.bucket_bytes)
        assert self._staged is not None
        if self._staged.params and self._ring is None:
            self._ring = RingWriter(self._layout)
        return {"export": export, "ring": self._layout if self._staged.params else None}

    def send(
        self,
        source: WeightSource,
        workers: dict[int, Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Let the workers have the segments, and send what is staged. Workers that died leave ``workers``."""
        assert self._staged is not None and self._plan is not None
        assert self._export is not None
        fds = {segment.id: self._exporter.segment(segment.id).fd for segment in self._export.segments}
        if self._staged.params and self._ring is not None:
            fds[RING] = self._ring.memory.fd
        for rank, worker in list(workers.items()):
            try:
                self._passing.bring(rank, worker, fds, deadline)
            except PeerLostError:  # the worker's own answer will say so; the others go on
                workers.pop(rank).close()
        if self._staged.params and self._ring is not None:
            tensors = staged_tensors(source, self._staged.params)
            self._ring.write(self._plan, tensors, list(workers.values()), deadline, progress)

    def release(self) -> None:
        """Keep everything: adopted parameters live in it."""

    def close(self) -> None:
        """Give everything back."""
        self._exporter.close()
        self._export = self._staged = self._plan = self._ring = None
        self._described = (None, None, None)
        self._passing.clear()
