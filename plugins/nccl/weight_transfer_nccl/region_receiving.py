"""A worker's pipeline by region: while one launch from all trainer ranks is scattered, the next ones arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ManifestMismatchError
from weight_transfer_nccl.buffers import WINDOW
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.launches import Launch, make_launches
from weight_transfer_nccl.routes import ALL, Route, plan_route, route_digest, split_shared

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, IncomingRegions, Manifest, Pieces
    from weight_transfer_nccl.buffers import Buffers
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Layout
    from weight_transfer_nccl.works import Work

_WHAT = "receiving the weights"

Shares = Sequence[dict[str, Any]]
"""By trainer rank, what it said in ``share_regions``."""


class RegionReceiving:
    """Receives this worker's pieces from all trainer ranks.

    Args:
        layout: the trainer's.
        worker: number of this worker among all.
        trainers: number of the trainer's ranks.
        workers: number of all workers.
        device: of the targets.
        buffers: what is scattered arrives there.
    """

    def __init__(
        self, layout: Layout, worker: int, trainers: int, workers: int, device: torch.device, buffers: Buffers
    ) -> None:
        self._layout = layout
        self._worker = worker
        self._trainers = trainers
        self._pairs = max(trainers, workers)
        self._arriving = Lane(device)
        self._scattering = Lane(device)
        self._buffers = buffers
        self._scattered: dict[int, Any] = {}
        self._pieces: Pieces | None = None
        self._shares: Shares | None = None
        self._routes: list[Route] = []
        self._moves: list[tuple[int, int]] = []
        self._targets: Sequence[torch.Tensor] = ()
        self._launches: list[Launch] = []

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that tables of copies take."""
        return sum(launch.copies.table_bytes for launch in self._launches)

    def receive(self, group: Group, shares: Shares, incoming: IncomingRegions, deadline: Deadline) -> None:
        """Receive every piece; returns when all are in place.

        Raises:
            ManifestMismatchError: a trainer rank planned otherwise.
        """
        posted: deque[tuple[Launch, Work]] = deque()

        def scatter_next() -> None:
            self._scatter(*posted.popleft(), incoming)

        with group.guard(deadline):
            if self._pieces is not incoming.pieces or self._shares is not shares:
                self._plan(shares, incoming)
            targets = incoming.targets
            if targets is not self._targets:
                self._prepare(incoming.layout.manifest, targets)
            self._arriving.after_caller()
            self._scattering.after_caller()
            with self._scattering:
                with self._arriving.instead_of(self._scattering):
                    group.begin_with([rank for rank, _ in self._moves], deadline).wait()
                self._arriving.finish(deadline, _WHAT)  # until here no byte can have come
                for launch in self._launches:
                    while _is_full(posted, launch.bucket):
                        scatter_next()
                    if launch.in_place:
                        incoming.write_in_place()
                    if launch.bucket is not None:
                        self._arriving.after(self._scattered.get(launch.bucket))
                    with self._arriving.instead_of(self._scattering):
                        posted.append((launch, launch.start(group, deadline)))
                while posted:
                    scatter_next()
            self._scattering.finish(deadline, _WHAT)
        for rank, nbytes in self._moves:
            incoming.moved(rank, nbytes)

    def _plan(self, shares: Shares, incoming: IncomingRegions) -> None:
        """Find what comes from which rank, and check that the ranks see it alike."""
        self._routes, self._moves, self._targets, self._launches, self._pieces = [], [], (), [], None
        for rank in range(self._trainers):
            share = shares[rank] if rank < len(shares) else {}
            pieces = incoming.pieces.of_rank(rank)
            theirs = share.get("plans", {}).get(str(self._worker))
            mine = route_digest(pieces, incoming.layout.manifest, self._layout, self._pairs) if len(pieces) else None
            if mine != theirs:
                raise ManifestMismatchError(
                    f"Trainer rank {rank} has another plan of what this worker takes; use one version of "
                    "weight-transfer-nccl on both sides.",
                    backend="nccl",
                    phase="update",
                )
            common, own = split_shared(pieces, set(share.get("broadcast", ())))
            if len(common):
                self._routes.append(plan_route(ALL, common, self._layout, 1))
            if len(own):
                self._routes.append(plan_route(rank, own, self._layout, self._pairs))
            if len(pieces):
                self._moves.append((rank, pieces.nbytes))
        self._pieces, self._shares = incoming.pieces, shares

    def _prepare(self, manifest: Manifest, targets: Sequence[torch.Tensor]) -> None:
        """Look up the targets. Nothing may be under way."""
        self._targets = ()
        self._launches = make_launches(self._routes, targets, manifest, self._buffers, outgoing=False)
        self._targets = targets

    def _scatter(self, launch: Launch, work: Work, incoming: IncomingRegions) -> None:
        work.wait()
        if launch.copies:
            incoming.write_in_place()
            launch.copies.run()
        if launch.bucket is not None:
            self._scattered[launch.bucket] = self._scattering.mark()


def _is_full(posted: deque[tuple[Launch, Work]], bucket: int | None) -> bool:
    """Whether the oldest launch has to be scattered before the next one may arrive: its bucket is needed."""
    return len(posted) == WINDOW or (bucket is not None and any(other.bucket == bucket for other, _ in posted))
