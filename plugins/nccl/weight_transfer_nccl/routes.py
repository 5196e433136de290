"""What goes by region from one trainer rank to one worker, in batches: derived on both sides from the pieces alone.

A route's batches are those of `weight_transfer_nccl.plan`, of boxes instead of tensors: small boxes are packed one
after another, large ones travel by themselves. The bytes of a box are its elements in row-major order, so either side
decides alone whether they travel from and into its own tensors, or by way of a bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.authoring import ALIGNMENT, Pieces, Slot
from weight_transfer_nccl.plan import Batch, Layout, Planner

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest

ALL = -1
"""The other side of a route on which everything is broadcast from rank 0 to all workers."""

Box = tuple[int, list[int], list[int]]
"""Number of a piece, first element within the piece, and elements; an index per dimension."""


class Boxes:
    """Pieces, split until each can be cut between rows of one dimension that fit in a batch.

    Args:
        pieces: which.
        limit: bytes of a batch.

    Attributes:
        sizes: bytes of each box.
        units: bytes of a row of each.
    """

    def __init__(self, pieces: Pieces, limit: int) -> None:
        shape = pieces.shape
        after = np.cumprod(shape[:, ::-1], axis=1)[:, ::-1]  # elements of a dimension and those after it
        rows = np.concatenate([after[:, 1:], np.ones_like(after[:, :1])], axis=1) * pieces.itemsize[:, None]
        dim = np.maximum((rows <= limit).argmax(axis=1), (shape > 1).argmax(axis=1))
        before = np.arange(shape.shape[1]) < dim[:, None]
        counts = np.where(before, shape, 1)
        parts = counts.prod(axis=1)
        which = np.repeat(np.arange(len(pieces)), parts)
        left = np.arange(len(which)) - np.repeat(parts.cumsum() - parts, parts)
        start = np.zeros((len(which), shape.shape[1]), dtype=np.int64)
        for column in range(shape.shape[1] - 1, -1, -1):
            start[:, column] = left % counts[which, column]
            left = left // counts[which, column]
        own = np.where(before, 1, shape)[which]
        unit = rows[np.arange(len(pieces)), dim][which]
        self.sizes: list[int] = (own.prod(axis=1) * pieces.itemsize[which]).tolist()
        self.units: list[int] = unit.tolist()
        self._piece: list[int] = which.tolist()
        self._dim: list[int] = dim[which].tolist()
        self._start: list[list[int]] = start.tolist()
        self._shape: list[list[int]] = own.tolist()

    def part(self, slot: Slot) -> Box:
        """Return what travels in a slot."""
        number, dim, unit = slot.param, self._dim[slot.param], self.units[slot.param]
        start, shape = self._start[number].copy(), self._shape[number].copy()
        start[dim] += slot.start // unit
        shape[dim] = slot.nbytes // unit
        return self._piece[number], start, shape


@attrs.frozen(eq=False)
class Route:
    """What goes from one trainer rank to one worker, or to all.

    Attributes:
        peer: rank of the other member of the group; `ALL` if it is broadcast.
        pieces: all of it.
        boxes: its pieces as the slots of the batches number them.
        batches: how it travels.
    """

    peer: int
    pieces: Pieces
    boxes: Boxes
    batches: tuple[Batch, ...]


def plan_route(peer: int, pieces: Pieces, layout: Layout, pairs: int) -> Route:
    """Return how pieces travel; the same pieces travel in the same way on both sides.

    Args:
        peer: see `Route`.
        pieces: of one trainer rank and one worker.
        layout: the trainer's.
        pairs: among how many members at most each bucket is divided.
    """
    limit = max(layout.bucket_bytes // pairs // ALIGNMENT, 1) * ALIGNMENT
    boxes = Boxes(pieces, limit)
    planner = Planner(attrs.evolve(layout, bucket_bytes=limit))
    for number, (nbytes, unit) in enumerate(zip(boxes.sizes, boxes.units, strict=True)):
        planner.add(number, nbytes, unit)
    return Route(peer, pieces, boxes, planner.finish())


def route_digest(pieces: Pieces, manifest: Manifest, layout: Layout, pairs: int) -> str:
    """Return 128 bits over all that decides what travels between two members, as hexadecimal digits."""
    digest = hashlib.blake2b(repr([manifest.digest, attrs.astuple(layout), pairs, pieces.shape.shape]).encode())
    for field in attrs.fields(Pieces):
        digest.update(np.ascontiguousarray(getattr(pieces, field.name), dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def common_shards(takers: Sequence[Pieces]) -> list[int]:
    """Return the shards of which all workers, two at least, take the same boxes: these are sent once, to all."""
    if len(takers) < 2:
        return []
    first, *others = ([pieces.shard, pieces.source_start, pieces.shape] for pieces in takers)
    shared = set(first[0].tolist())
    rows_of_first = _rows(*first)
    for other in others:
        rows = _rows(*other)
        shared = {shard for shard in shared if rows.get(shard) == rows_of_first[shard]}
    return sorted(shared)


def split_shared(pieces: Pieces, shared: Set[int]) -> tuple[Pieces, Pieces]:
    """Return the pieces of some shards, and those of all others."""
    chosen = np.isin(pieces.shard, sorted(shared))
    return pieces.where(np.flatnonzero(chosen)), pieces.where(np.flatnonzero(~chosen))


def _rows(shard: np.ndarray, start: np.ndarray, shape: np.ndarray) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for number, row in zip(shard.tolist(), np.concatenate([start, shape], axis=1).tolist(), strict=True):
        found.setdefault(number, []).append(row)
    return found
