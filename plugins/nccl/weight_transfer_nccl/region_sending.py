"""A trainer rank's pipeline by region: while one launch is on its way to all workers, the next one is packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weight_transfer_nccl.buffers import WINDOW
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.launches import Launch, make_launches
from weight_transfer_nccl.routes import ALL, Route, common_shards, plan_route, route_digest, split_shared

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, OutgoingRegions
    from weight_transfer_nccl.buffers import Buffers
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Layout
    from weight_transfer_nccl.works import Work


class RegionSending:
    """Sends this rank's pieces to all workers.

    Args:
        layout: this trainer's.
        trainers: number of the trainer's ranks.
        workers: number of all workers.
        device: of the shards.
        buffers: what is packed lies there.
    """

    def __init__(self, layout: Layout, trainers: int, workers: int, device: torch.device, buffers: Buffers) -> None:
        self._layout = layout
        self._trainers = trainers
        self._pairs = max(trainers, workers)
        self._lane = Lane(device)
        self._buffers = buffers
        self._outgoing: OutgoingRegions | None = None
        self._share: dict[str, Any] = {}
        self._routes: list[Route] = []
        self._launches: list[Launch] | None = None

    def share(self, outgoing: OutgoingRegions) -> dict[str, Any]:
        """Return what the workers have to know: digests of the routes, by worker, and the shards that are broadcast."""
        if self._outgoing is not outgoing:
            # A broadcast takes all members of the group: were there other trainer ranks among them, they would wait.
            shared = common_shards([taker.pieces for taker in outgoing.takers]) if self._trainers == 1 else []
            self._routes = []
            plans = {}
            for number, taker in enumerate(outgoing.takers):
                common, own = split_shared(taker.pieces, set(shared))
                if shared and not number:
                    self._routes.append(plan_route(ALL, common, self._layout, 1))
                if len(own):
                    self._routes.append(plan_route(self._trainers + taker.worker, own, self._layout, self._pairs))
                if len(taker.pieces):
                    plans[str(taker.worker)] = route_digest(
                        taker.pieces, outgoing.layout.manifest, self._layout, self._pairs
                    )
            self._share = {"plans": plans, "broadcast": shared}
            self._outgoing, self._launches = outgoing, None
        return self._share

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that tables of copies take."""
        return sum(launch.copies.table_bytes for launch in self._launches or ())

    def send(
        self, group: Group, outgoing: OutgoingRegions, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Send every piece; returns when all of them have left."""
        self.share(outgoing)
        takers = [self._trainers + taker.worker for taker in outgoing.takers if len(taker.pieces)]
        running: deque[tuple[Work, int | None]] = deque()
        with group.guard(deadline):
            launches = self._launches or self._prepare(outgoing)
            self._lane.after_caller()
            with self._lane:
                for index, launch in enumerate(launches):
                    while _is_full(running, launch.bucket):
                        running.popleft()[0].wait()
                    launch.copies.run()
                    if not index:  # a rank that fails before costs the workers nothing
                        group.begin_with(takers, deadline).wait()
                    running.append((launch.start(group, deadline), launch.bucket))
                    progress(launch.nbytes)
                while running:
                    running.popleft()[0].wait()
            self._lane.finish(deadline, "sending the weights")

    def _prepare(self, outgoing: OutgoingRegions) -> list[Launch]:
        """Look up the shards. Nothing may be under way."""
        manifest = outgoing.layout.manifest
        self._launches = make_launches(self._routes, outgoing.tensors, manifest, self._buffers, outgoing=True)
        return self._launches


def _is_full(running: deque[tuple[Work, int | None]], bucket: int | None) -> bool:
    """Whether the oldest launch has to leave before the next one: its bucket is needed."""
    return len(running) == WINDOW or (bucket is not None and any(other == bucket for _, other in running))
