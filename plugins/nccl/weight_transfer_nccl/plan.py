"""What is broadcast, in which order: derived on both sides from the manifest and the trainer's options alone.

The weights travel in batches of at most one bucket, in the manifest's order. In a batch, the tensors that are smaller
than ``direct_bytes`` are packed at the bucket's beginning and go out as one broadcast, unless all are empty; larger
ones travel from their own storage, cut where the bucket's size demands it, one broadcast each. NCCL runs all
broadcasts of a batch in one launch, so they follow each other without a gap.

Between two launches there is one, of some 20 µs. So where every member sends from and receives into the tensors' own
storage, of which they assure each other, the large ones of several buckets go out in one launch.
"""

from __future__ import annotations

import attrs

from weight_transfer.authoring import ALIGNMENT, Manifest, Slot, digest_json

_LONG = 4  # buckets' worth of large tensors in a long launch
_SLIVER = 2**20  # bytes; no large tensor is cut to fill less than this at the end of a batch


@attrs.frozen
class Layout:
    """The trainer's options that decide the plan; they travel when a worker joins."""

    bucket_bytes: int
    buckets: int
    direct_bytes: int


@attrs.frozen
class Batch:
    """What travels in one launch.

    Attributes:
        packed: the small tensors, one after another from the bucket's first byte.
        packed_bytes: where the last of them ends in the bucket.
        direct: the pieces of large tensors; the offset is a piece's place in the bucket of a worker that cannot
            receive it into the tensor's own storage.
        nbytes: of all its weights.
    """

    packed: tuple[Slot, ...]
    packed_bytes: int
    direct: tuple[Slot, ...]
    nbytes: int

    @property
    def bucket_bytes(self) -> int:
        """Where the last slot ends in the bucket."""
        last = self.direct[-1] if self.direct else None
        return self.packed_bytes if last is None else last.offset + last.nbytes


@attrs.frozen(slots=False)
class Plan:
    """All batches of an update, in order.

    Attributes:
        manifest: what is sent.
        batches: how.
        long: how, if no large tensor needs a place in a bucket.
        digest: what both sides compare before the first byte.
    """

    manifest: Manifest
    batches: tuple[Batch, ...]
    long: tuple[Batch, ...]
    digest: str


def make_plan(manifest: Manifest, layout: Layout) -> Plan:
    """Return the plan; the same arguments give the same plan everywhere."""
    planners = Planner(layout), Planner(layout, _LONG)
    for index, param in enumerate(manifest.params):
        for planner in planners:
            planner.add(index, param.nbytes)
    batches, long = (planner.finish() for planner in planners)
    return Plan(manifest, batches, long, digest_json([manifest.digest, attrs.astuple(layout), _LONG]))


class Planner:
    """Fills batch after batch.

    Args:
        layout: how large they may be.
        long: how many buckets' worth of large tensors may travel at once, beside small ones; 0: all of a batch has to
            fit in one bucket.
    """

    def __init__(self, layout: Layout, long: int = 0) -> None:
        self._bucket_bytes = layout.bucket_bytes // ALIGNMENT * ALIGNMENT
        self._long_bytes = long * self._bucket_bytes
        self._direct_from = max(min(layout.direct_bytes, self._bucket_bytes), 1)  # what is empty is packed
        self._batches: list[Batch] = []
        self._begin()

    def _begin(self) -> None:
        self._packed: list[Slot] = []
        self._packed_bytes = 0
        self._direct: list[Slot] = []  # offsets are counted from the end of what is packed, which may still grow
        self._direct_bytes = 0

    @property
    def _room(self) -> int:
        """Bytes that are left for small tensors."""
        return self._bucket_bytes - _aligned(self._packed_bytes) - (0 if self._long_bytes else self._direct_bytes)

    @property
    def _direct_room(self) -> int:
        """Bytes that are left for large ones."""
        return self._long_bytes - self._direct_bytes if self._long_bytes else self._room

    def add(self, param: int, nbytes: int, unit: int = 1) -> None:
        """Add the next tensor; it is cut between units only, of some bytes that fit in a bucket."""
        if nbytes >= self._direct_from:
            self._cut(param, nbytes, unit)
            return
        if nbytes > self._room:
            self._close()
        start = _aligned(self._packed_bytes)
        self._packed.append(Slot(param, 0, start, nbytes, last=True))
        self._packed_bytes = start + nbytes

    def _cut(self, param: int, nbytes: int, unit: int) -> None:
        start = 0
        while start < nbytes:
            if self._direct_room < min(nbytes - start, max(_SLIVER, unit)):
                self._close()
            size = min(nbytes - start, self._direct_room // unit * unit)
            self._direct.append(Slot(param, start, self._direct_bytes, size, last=start + size == nbytes))
            self._direct_bytes += _aligned(size)
            start += size

    def _close(self) -> None:
        shift = _aligned(self._packed_bytes)
        direct = tuple(attrs.evolve(slot, offset=shift + slot.offset) for slot in self._direct)
        nbytes = sum(slot.nbytes for slot in (*self._packed, *direct))
        if self._packed or direct:
            self._batches.append(Batch(tuple(self._packed), self._packed_bytes, direct, nbytes))
        self._begin()

    def finish(self) -> tuple[Batch, ...]:
        """Return all batches."""
        self._close()
        return tuple(self._batches)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
