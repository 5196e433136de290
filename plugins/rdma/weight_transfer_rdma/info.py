"""What the trainer's engine tells the workers' over the control channel."""

from __future__ import annotations

import attrs

from weight_transfer.authoring import WeightTransferInitInfo, WeightTransferUpdateInfo, sent_once
from weight_transfer_rdma.nixl import DRAM, Place
from weight_transfer_rdma.packing import Worth

WORD = 8
"""Bytes of a counter. A trainer counts the buckets that it has filled at ``flags``; the worker of rank r, those that it
has read at ``flags + r * WORD``."""

MOST_WORKERS = 8191
"""Workers that one trainer serves."""

_FIRST_RING = MOST_WORKERS + 1  # index of a counter
FLAGS_BYTES = (_FIRST_RING + 2 * MOST_WORKERS) * WORD


def ring_counter(worker: int) -> int:
    """Return the index of the counter of buckets that a trainer rank has filled for a worker, numbered from 0.

    The next one counts those that the worker has read.
    """
    return _FIRST_RING + 2 * worker


@attrs.frozen(kw_only=True)
class Endpoint:
    """The trainer's agent.

    Attributes:
        agent: its name.
        metadata: NIXL's description of it, which says where to connect and which regions there are.
        flags: address of the counters.
        probe: address of `PROBE_BYTES` bytes in the same kind of memory as the weights.
        memory: the kind of memory of the weights, ``"DRAM"`` or ``"VRAM"``.
        device: their CUDA device's index in the trainer.
    """

    agent: str
    metadata: bytes = attrs.field(repr=False)
    flags: int
    probe: int
    memory: str = DRAM
    device: int = 0

    @property
    def place(self) -> Place:
        return Place(self.memory, self.device)


PROBE_BYTES = 64 * 1024


@attrs.frozen(kw_only=True)
class Table:
    """Where the weights lie in the trainer's agent.

    Attributes:
        addresses: of each parameter, in the manifest's order; -1 for those that come through the trainer's buckets.
        region_addresses: first bytes of the regions that may be read.
        region_sizes: their sizes in bytes.
        buckets: addresses of the buckets; empty if none are needed.
        bucket_bytes: size of a bucket.
    """

    addresses: tuple[int, ...]
    region_addresses: tuple[int, ...]
    region_sizes: tuple[int, ...]
    buckets: tuple[int, ...]
    bucket_bytes: int


@attrs.frozen(kw_only=True)
class Share:
    """How workers get at the shards of a trainer rank, in an update by region.

    Attributes:
        endpoint: the rank's agent as it is now.
        addresses: of each shard, in the order of `Layout.shards`; -1 for those that must be packed.
        region_addresses: first bytes of the regions that may be read.
        region_sizes: their sizes in bytes.
        worth: what workers read where it lies; the rest is packed.
        rings: by worker, the address of the first of its buckets; -1 if nothing is packed for it.
        buckets: how many each of them has, one after another.
        bucket_bytes: size of a bucket.
        turn: the counters of buckets began anew whenever this changes.
    """

    endpoint: Endpoint
    addresses: tuple[int, ...]
    region_addresses: tuple[int, ...]
    region_sizes: tuple[int, ...]
    worth: Worth
    rings: tuple[int, ...]
    buckets: int
    bucket_bytes: int
    turn: int


@attrs.frozen(kw_only=True)
class RdmaInitInfo(WeightTransferInitInfo):
    """How to reach the trainer's agent."""

    endpoint: Endpoint


@attrs.frozen(kw_only=True)
class RdmaUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are.

    Attributes:
        endpoint: the trainer's agent as it is now.
        table: where the weights lie in it.
        filled: buckets that the trainer had filled before this update.
    """

    endpoint: Endpoint = sent_once()
    table: Table = sent_once()
    filled: int = 0
