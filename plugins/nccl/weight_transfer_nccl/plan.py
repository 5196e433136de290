"""What is broadcast, in which order: derived on both sides from the manifest and the trainer's options alone.

A tensor of at least ``direct_bytes`` travels from its own storage, in pieces of at most one bucket. Smaller ones are
packed into buckets, each of which goes out when it is full.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from weight_transfer.buckets import ALIGNMENT, Slot
from weight_transfer.manifest import Manifest, ParamMeta, digest_json


@attrs.frozen
class Layout:
    """The trainer's options that decide the plan; they travel when a worker joins."""

    bucket_bytes: int
    buckets: int
    direct_bytes: int


@attrs.frozen
class Broadcast:
    """One broadcast.

    Attributes:
        slots: what it carries: one piece of a large tensor, or the small tensors of one bucket.
        nbytes: its length.
        direct: whether it goes from and into a tensor's own storage.
    """

    slots: tuple[Slot, ...]
    nbytes: int
    direct: bool


@attrs.frozen(slots=False)
class Plan:
    """All broadcasts of an update, in order.

    Attributes:
        manifest: what is sent.
        broadcasts: how.
        digest: what both sides compare before the first byte.
    """

    manifest: Manifest
    broadcasts: tuple[Broadcast, ...]
    digest: str


def make_plan(manifest: Manifest, layout: Layout) -> Plan:
    """Return the plan; the same arguments give the same plan everywhere."""
    broadcasts: list[Broadcast] = []
    slots: list[Slot] = []
    offset = 0
    for index, param in enumerate(manifest.params):
        if param.nbytes >= min(layout.direct_bytes, layout.bucket_bytes):
            broadcasts.extend(_pieces(index, param, layout.bucket_bytes))
            continue
        start = -(-offset // ALIGNMENT) * ALIGNMENT
        if start + param.nbytes > layout.bucket_bytes:
            broadcasts.append(_packed(slots))
            slots, start = [], 0
        slots.append(Slot(index, 0, start, param.nbytes, last=True))
        offset = start + param.nbytes
    if slots:
        broadcasts.append(_packed(slots))
    return Plan(manifest, tuple(broadcasts), digest_json([manifest.digest, attrs.astuple(layout)]))


def _pieces(index: int, param: ParamMeta, bucket_bytes: int) -> list[Broadcast]:
    starts = range(0, param.nbytes, bucket_bytes)
    return [
        Broadcast((Slot(index, start, 0, size, last=start + size == param.nbytes),), size, direct=True)
        for start in starts
        for size in (min(bucket_bytes, param.nbytes - start),)
    ]


def _packed(slots: Sequence[Slot]) -> Broadcast:
    last = slots[-1]
    return Broadcast(tuple(slots), last.offset + last.nbytes, direct=False)
