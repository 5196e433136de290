"""A ring of shared buckets for weights that the workers cannot read in place: gathered, temporary or foreign tensors.

The trainer fills a bucket and signals; each worker loads it and signals back; a bucket is filled again when all workers
have loaded it. Signals are single bytes on the workers' sockets, so a dead peer ends every wait at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.authoring import (
    ALIGNMENT,
    BucketPlan,
    Packer,
    PrivateView,
    SharedMemory,
    Unpacker,
    destinations_of,
    plan_buckets,
)
from weight_transfer.errors import PeerLostError

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.connection import Connection

RING = 0
"""The ring's segment id; exported segments count from 1."""


@attrs.frozen
class RingLayout:
    """Size and number of the buckets, in one segment that holds them one after another."""

    bucket_bytes: int
    buckets: int

    @classmethod
    def fitting(cls, staged: Manifest, bucket_bytes: int, buckets: int) -> RingLayout:
        """Return a ring for ``staged`` with buckets of at most ``bucket_bytes``, and no larger than it needs."""
        needed = sum(-(-param.nbytes // ALIGNMENT) * ALIGNMENT for param in staged.params)
        return cls(max(min(bucket_bytes, needed), ALIGNMENT), buckets)

    @property
    def nbytes(self) -> int:
        return self._stride * self.buckets

    def buffers(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the buckets of a segment (uint8 ``[nbytes]``); each begins at a multiple of the alignment."""
        return list(memory[: self.nbytes].split(self._stride))

    def span(self, index: int) -> tuple[int, int]:
        """Return where bucket ``index`` of an update begins in the segment, and its size, in bytes."""
        return index % self.buckets * self._stride, self._stride

    @property
    def _stride(self) -> int:
        return -(-self.bucket_bytes // ALIGNMENT) * ALIGNMENT


class RingWriter:
    """The trainer's side. It reserves the memory when it is first needed."""

    def __init__(self, layout: RingLayout) -> None:
        self.layout = layout
        self.memory = SharedMemory(layout.nbytes)
        self._buffers = layout.buffers(self.memory.storage(0, layout.nbytes))
        self._packer: Packer | None = None

    def write(
        self,
        plan: BucketPlan,
        tensors: Iterator[torch.Tensor],
        readers: Sequence[Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
    ) -> None:
        """Send the tensors of ``plan``, in its order; returns when all readers have loaded all of them."""
        if self._packer is None or self._packer.plan is not plan:
            self._packer = Packer(plan, self._buffers)
        packing, count = self._packer.packing(tensors), len(plan.buckets)
        readers = list(readers)
        for index in range(count):
            if index >= len(self._buffers):
                each(readers, lambda reader: reader.await_signal(deadline))
            nbytes = next(packing)
            each(readers, lambda reader: reader.signal(deadline))
            progress(nbytes)
        for _ in range(min(count, len(self._buffers))):
            each(readers, lambda reader: reader.await_signal(deadline))


def each(readers: list[Connection], call: Callable[[Connection], None]) -> None:
    """Call for each reader; one that died is dropped (its own answer to the sender says so), the last one raises."""
    for reader in list(readers):
        try:
            call(reader)
        except PeerLostError:
            readers.remove(reader)
            if not readers:
                raise


class RingReader:
    """A worker's side.

    Args:
        layout: of the trainer's ring.
        memory: the ring.
        staged: what goes through it.
    """

    def __init__(self, layout: RingLayout, memory: PrivateView, staged: Manifest) -> None:
        self._plan = plan_buckets(staged.params, layout.bucket_bytes)
        self._unpacker = Unpacker(self._plan, layout.buffers(memory.data))
        self._layout, self._memory = layout, memory

    def read(self, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        """Load every bucket."""
        foreign = destinations_of(load_weights) is None

        def load(index: int) -> None:
            self._unpacker.load(index, load_weights)
            if foreign:  # the loader is the user's, and may have written into what it was given
                self._memory.renew(*self._layout.span(index))

        read_buckets(len(self._plan.buckets), load, trainer, deadline)


def read_buckets(count: int, load: Callable[[int], None], trainer: Connection, deadline: Deadline) -> None:
    """Load each bucket once it is full, and say so."""
    for index in range(count):
        trainer.await_signal(deadline)
        load(index)
        trainer.signal(deadline)
