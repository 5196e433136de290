"""What a worker reads from one trainer rank by region, straight to where it keeps it where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from weight_transfer.authoring import ALIGNMENT, Layout, Pieces, Tensors, boxes_of
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_rdma.copies import Copies, packed, parts
from weight_transfer_rdma.memory import Arena, Located
from weight_transfer_rdma.nixl import DRAM, VRAM, Place
from weight_transfer_rdma.packing import NOWHERE, can_be_read, pack, row_major, shard_shapes
from weight_transfer_rdma.plan import Integers, Regions, cuts, merge
from weight_transfer_rdma.reading import Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from weight_transfer.authoring import IncomingRegions
    from weight_transfer_rdma.info import Share
    from weight_transfer_rdma.nixl import Rows

_CHUNK = {DRAM: 64 * 2**20, VRAM: 512 * 2**20}  # bytes of one read into the worker's own tensors

Prepare = Callable[["Rows"], int]
"""Prepares a read, and returns its handle."""


@attrs.frozen(eq=False)
class Keep:
    """What a worker keeps, and where.

    Attributes:
        layout: what the trainer's ranks hold.
        targets: the worker's own tensors.
        shapes: theirs, int64 ``[targets, dims]``, filled up with 1.
        located: where the worker's agent finds them.
        place: the kind of memory.
    """

    layout: Layout
    targets: Sequence[torch.Tensor]
    shapes: Integers
    located: Located
    place: Place

    @classmethod
    def of(cls, incoming: IncomingRegions, located: Located, place: Place) -> Keep:
        """Describe the targets of an update."""
        shapes = np.ones((len(incoming.targets), incoming.pieces.shape.shape[1]), dtype=np.int64)
        for row, target in zip(shapes, incoming.targets, strict=True):
            row[: target.dim()] = target.shape
        return cls(incoming.layout, incoming.targets, shapes, located, place)

    @property
    def tensors(self) -> Tensors:
        """Where those targets lie that the agent reaches."""
        return Tensors(self.located.addresses, row_major(self.shapes))

    def have_place(self, pieces: Pieces) -> NDArray[np.bool_]:
        """Say of which pieces the agent reaches the target."""
        found: NDArray[np.bool_] = self.located.addresses[pieces.target] != NOWHERE
        return found

    def scattering(self, pieces: Pieces, buffer: torch.Tensor, offsets: Integers) -> Copies:
        """Return the copies of pieces from a staging bucket into their targets."""
        params = [self.layout.manifest.params[param] for param in pieces.param.tolist()]
        dtypes, dims = [param.dtype for param in params], [len(param.shape) for param in params]

        def find() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            sources = packed(buffer, offsets, pieces, dtypes, dims)
            return parts(self.targets, pieces.target, pieces.target_start, pieces.shape), sources

        return Copies(find, keep=self.place.memory == VRAM)


@attrs.frozen(eq=False)
class Draft:
    """A job whose staging bucket is not chosen yet.

    Attributes:
        turn: when its turn is: 0 to 1, over all that comes from the rank in the same way.
        rank: the trainer rank.
        buffer_bytes: of the staging bucket that it needs; 0 if none.
        make: prepares it.
    """

    turn: float
    rank: int
    buffer_bytes: int
    make: Callable[[Arena | None], Job]


class RankReads:
    """What a worker reads from one trainer rank.

    Args:
        rank: of the trainer.
        share: what that rank says of its shards.
        worker: this worker's number.
        pieces: what comes from the rank.
        keep: what the worker keeps.
        staged_bytes: of this side's staging buckets for what is read where it lies.
        prepare: prepares reads from the rank.

    Raises:
        ManifestMismatchError: the rank's share does not fit the layout.
    """

    def __init__(
        self, rank: int, share: Share, worker: int, pieces: Pieces, keep: Keep, staged_bytes: int, prepare: Prepare
    ) -> None:
        self._rank, self._share, self._keep, self._prepare = rank, share, keep, prepare
        self._shapes = shard_shapes(keep.layout, rank, pieces.shape.shape[1])
        self._addresses = np.array(share.addresses, dtype=np.int64)
        if len(self._addresses) != len(self._shapes) or len(share.region_addresses) != len(share.region_sizes):
            raise self._disagreement("addresses")
        self._regions = Regions.of(list(zip(share.region_addresses, share.region_sizes, strict=True)))
        readable = can_be_read(pieces, self._addresses, self._shapes, share.worth)
        own = pieces.where(np.flatnonzero(readable))
        direct = keep.have_place(own) & share.worth.of(own, self._shapes[own.shard], keep.shapes[own.target])
        self._direct = own.where(np.flatnonzero(direct))
        self._staged = pack(own.where(np.flatnonzero(~direct)), staged_bytes)
        self._ring = share.rings[worker] if worker < len(share.rings) else NOWHERE
        rest = pieces.where(np.flatnonzero(~readable))
        if len(rest) and (self._ring == NOWHERE or min(share.buckets, share.bucket_bytes - ALIGNMENT + 1) < 1):
            raise self._disagreement("buckets")
        self._packed = pack(rest, share.bucket_bytes)

    @property
    def buckets(self) -> int:
        """How many buckets the rank fills in each update."""
        return self._packed.buckets

    def drafts(self) -> Iterator[Draft]:
        """Yield what is to be read, in each way in order."""
        yield from self._read_direct()
        for number in range(self._staged.buckets):
            yield Draft(number / self._staged.buckets, self._rank, self._staged.used(number), self._staging(number))
        for number in range(self._packed.buckets):
            chosen = self._packed.of_bucket(number)
            direct = self._are_direct(self._packed.pieces.where(chosen))
            nbytes = 0 if direct.all() else self._packed.used(number)
            yield Draft((number + 0.5) / self._packed.buckets, self._rank, nbytes, self._unpacking(number))

    def _read_direct(self) -> Iterator[Draft]:
        if not len(self._direct):
            return
        boxes = boxes_of(self._direct, self._sources, self._keep.tensors)
        table = _rows(boxes.target, boxes.source, boxes.run, boxes.count, boxes.target_step, boxes.source_step)
        order = np.argsort(table[0], kind="stable")
        chunks = np.split(order, cuts(table[2][order], _CHUNK[self._keep.place.memory]))
        for number, chunk in enumerate(chunks):
            yield Draft(number / len(chunks), self._rank, 0, self._reading(table[:, chunk]))

    def _reading(self, table: Integers) -> Callable[[Arena | None], Job]:
        def make(_arena: Arena | None) -> Job:
            handle = self._prepare(self._merged(table, self._keep.located.regions))
            nbytes = int(table[2].sum())
            return Job(handle, 0, nbytes, _telling(self._rank, nbytes), claim=_claim, rank=self._rank)

        return make

    def _staging(self, number: int) -> Callable[[Arena | None], Job]:
        """Return what prepares reads of strided targets' pieces, from where they lie into a staging bucket."""

        def make(arena: Arena | None) -> Job:
            assert arena is not None
            chosen = self._staged.of_bucket(number)
            pieces, offsets = self._staged.pieces.where(chosen), self._staged.offset[chosen]
            boxes = boxes_of(_into(pieces), self._sources, _dense(pieces, arena.address + offsets))
            table = _rows(boxes.target, boxes.source, boxes.run, boxes.count, boxes.target_step, boxes.source_step)
            handle = self._prepare(self._merged(table, None))
            nbytes = int(pieces.sizes.sum())
            load = _scattering(self._keep.scattering(pieces, arena.data, offsets), self._rank, nbytes)
            return Job(handle, 0, nbytes, load, buffered=True, rank=self._rank)

        return make

    def _unpacking(self, number: int) -> Callable[[Arena | None], Job]:
        """Return what prepares reads of one of the rank's buckets."""

        def make(arena: Arena | None) -> Job:
            chosen = self._packed.of_bucket(number)
            pieces, offsets = self._packed.pieces.where(chosen), self._packed.offset[chosen]
            remote = self._ring + number % self._share.buckets * self._share.bucket_bytes + offsets
            direct = self._are_direct(pieces)
            rows, nbytes = [], int(pieces.sizes.sum())
            if direct.any():
                own = pieces.where(np.flatnonzero(direct))
                boxes = boxes_of(_from(own), _dense(own, remote[direct]), self._keep.tensors)
                table = _rows(boxes.target, boxes.source, boxes.run, boxes.count, boxes.target_step, boxes.source_step)
                rows.append(table.T.astype(np.uint64))
            load = _telling(self._rank, nbytes)
            if not direct.all():
                assert arena is not None
                own, offsets = pieces.where(np.flatnonzero(~direct)), offsets[~direct]
                table = np.stack([arena.address + offsets, remote[~direct], own.sizes])
                rows.append(_joined(table))
                load = _scattering(self._keep.scattering(own, arena.data, offsets), self._rank, nbytes)
            handle = self._prepare(np.concatenate(rows))
            claim, buffered = _claim if direct.any() else None, not direct.all()
            return Job(handle, number + 1, 0, load, claim=claim, buffered=buffered, rank=self._rank)

        return make

    def _are_direct(self, pieces: Pieces) -> NDArray[np.bool_]:
        """Say which pieces of a bucket are read straight into their targets."""
        return self._keep.have_place(pieces) & self._share.worth.of(pieces, self._keep.shapes[pieces.target])

    @property
    def _sources(self) -> Tensors:
        return Tensors(self._addresses, row_major(self._shapes))

    def _merged(self, table: Integers, here: Regions | None) -> Rows:
        """Return rows, neighbours joined, none across the border of a region; ``here`` is None for a staging bucket."""
        local, remote, sizes = table
        there = self._regions.index(remote, sizes)
        home = here.index(local, sizes) if here is not None else np.zeros_like(there)
        padding = np.full_like(there, 0 if here is not None else ALIGNMENT - 1)
        return merge(local, remote, sizes, home, there, padding)

    def _disagreement(self, what: str) -> ManifestMismatchError:
        return ManifestMismatchError(
            f"What trainer rank {self._rank} says of its {what} does not fit the layout.", backend="rdma"
        )


def _rows(
    local: Integers, remote: Integers, run: Integers, count: Integers, local_step: Integers, remote_step: Integers
) -> Integers:
    """Return local address, remote address and bytes of each run of boxes, int64 ``[3, runs]``."""
    box = np.repeat(np.arange(len(run)), count)
    index = np.arange(len(box)) - np.repeat(count.cumsum() - count, count)
    return np.stack([local[box] + index * local_step[box], remote[box] + index * remote_step[box], run[box]])


def _joined(table: Integers) -> Rows:
    """Return the rows that read from one bucket into another, where everything has the same offset."""
    nothing = np.zeros(table.shape[1], dtype=np.int64)
    local, remote, sizes = table
    return merge(local, remote, sizes, nothing, nothing, np.full_like(nothing, ALIGNMENT - 1))


def _dense(pieces: Pieces, addresses: Integers) -> Tensors:
    """Return pieces as contiguous tensors of their own."""
    return Tensors(addresses, row_major(pieces.shape))


def _from(pieces: Pieces) -> Pieces:
    """Return pieces whose sources are themselves, numbered in order."""
    return attrs.evolve(pieces, shard=np.arange(len(pieces)), source_start=np.zeros_like(pieces.source_start))


def _into(pieces: Pieces) -> Pieces:
    """Return pieces whose targets are themselves, numbered in order."""
    return attrs.evolve(pieces, target=np.arange(len(pieces)), target_start=np.zeros_like(pieces.target_start))


def _claim(incoming: IncomingRegions) -> None:
    incoming.write_in_place()


def _telling(rank: int, nbytes: int) -> Callable[[IncomingRegions], None]:
    return lambda incoming: incoming.moved(rank, nbytes)


def _scattering(copies: Copies, rank: int, nbytes: int) -> Callable[[IncomingRegions], None]:
    def load(incoming: IncomingRegions) -> None:
        incoming.write_in_place()
        copies.run()
        incoming.moved(rank, nbytes)

    return load
