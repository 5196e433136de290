"""What travels in one launch: a batch of every route, with where its bytes lie on this side.

A box that travels by itself does so from or into its tensor if it is contiguous there; all else lies in a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.authoring import ALIGNMENT, as_bytes
from weight_transfer_nccl.group import Parcel
from weight_transfer_nccl.routes import ALL
from weight_transfer_nccl.views import Copies, Ends, View

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Manifest, Slot
    from weight_transfer_nccl.buffers import Buffers
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Batch
    from weight_transfer_nccl.routes import Route
    from weight_transfer_nccl.works import Work


@attrs.frozen
class Launch:
    """What travels at once.

    Attributes:
        parcels: to or from whom, and where the bytes lie; `ALL` stands for a broadcast, and then for all of them.
        bucket: number of the bucket that some of them lie in, or None.
        copies: between the bucket and the tensors.
        in_place: whether bytes travel from or into tensors.
        nbytes: of weights.
    """

    parcels: list[Parcel]
    bucket: int | None
    copies: Copies
    in_place: bool
    nbytes: int

    def start(self, group: Group, deadline: Deadline) -> Work:
        """Start to send them, on a trainer's rank, or to receive them, on a worker."""
        if self.parcels[0][0] == ALL:
            return group.broadcast([data for _, data in self.parcels], deadline)
        return group.exchange(self.parcels, deadline)


def make_launches(
    routes: Sequence[Route], tensors: Sequence[torch.Tensor], manifest: Manifest, buffers: Buffers, *, outgoing: bool
) -> list[Launch]:
    """Return the launches of some routes, in the order in which all members run them.

    Args:
        routes: all of a trainer rank, or of a worker.
        tensors: its shards, or its targets.
        manifest: in whose dtypes the bytes travel.
        buffers: they get the size that is needed; nothing may be under way in them.
        outgoing: whether bytes leave the tensors.
    """
    ends = Ends(tensors, buffers.device, outgoing)
    drafts = []
    for together in _rounds(routes):
        draft = _Draft(ends, manifest)
        for route, batch in together:
            draft.add(route, batch)
        drafts.append(draft)
    buffers.reserve(max((draft.need for draft in drafts), default=0))
    return [draft.launch(buffers) for draft in drafts]


def _rounds(routes: Sequence[Route]) -> Iterator[list[tuple[Route, Batch]]]:
    """Yield the batches that travel at once: one that is broadcast, or else one of every other route."""
    for route in routes:
        if route.peer == ALL:
            yield from ([(route, batch)] for batch in route.batches)
    others = [route for route in routes if route.peer != ALL]
    for batches in zip_longest(*(route.batches for route in others)):
        yield [(route, batch) for route, batch in zip(others, batches, strict=True) if batch is not None]


class _Draft:
    """A launch that has no bucket yet.

    Attributes:
        need: bytes of a bucket.
    """

    def __init__(self, ends: Ends, manifest: Manifest) -> None:
        self.need = 0
        self._ends = ends
        self._manifest = manifest
        self._nbytes = 0
        self._parcels: list[tuple[int, torch.Tensor | tuple[int, int]]] = []
        self._staged: list[tuple[int, View]] = []

    def add(self, route: Route, batch: Batch) -> None:
        """Let a batch travel, too."""
        self._nbytes += batch.nbytes
        if batch.packed:
            base = self._stage(batch.packed_bytes)
            self._parcels.append((route.peer, (base, batch.packed_bytes)))
            self._staged += [(base + slot.offset, self._view(route, slot)) for slot in batch.packed]
        for slot in batch.direct:
            view = self._view(route, slot)
            if view.direct:
                self._parcels.append((route.peer, as_bytes(view.tensor)))
                continue
            base = self._stage(slot.nbytes)
            self._parcels.append((route.peer, (base, slot.nbytes)))
            self._staged.append((base, view))

    def launch(self, buffers: Buffers) -> Launch:
        """Take a bucket if one is needed."""
        number, bucket = buffers.take() if self.need else (None, torch.empty(0))
        parcels = [
            (peer, data if isinstance(data, torch.Tensor) else bucket[data[0] : sum(data)])
            for peer, data in self._parcels
        ]
        copies = self._ends.copies(bucket, self._staged)
        in_place = any(isinstance(data, torch.Tensor) for _, data in self._parcels)
        return Launch(parcels, number, copies, in_place, self._nbytes)

    def _stage(self, nbytes: int) -> int:
        base = self.need
        self.need = -(-(base + nbytes) // ALIGNMENT) * ALIGNMENT
        return base

    def _view(self, route: Route, slot: Slot) -> View:
        piece, start, shape = route.boxes.part(slot)
        number, first = self._ends.place(route.pieces, piece)
        meta = self._manifest.params[int(route.pieces.param[piece])]
        return self._ends.view(number, [a + b for a, b in zip(first, start, strict=True)], shape, meta)
