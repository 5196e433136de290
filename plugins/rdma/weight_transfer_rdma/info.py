"""What the trainer's engine tells the workers' over the control channel."""

from __future__ import annotations

import attrs

from weight_transfer.authoring import WeightTransferInitInfo, WeightTransferUpdateInfo, sent_once
from weight_transfer_rdma.nixl import DRAM, Place

WORD = 8
"""Bytes of a counter. A trainer counts the buckets that it has filled at ``flags``; the worker of rank r, those that it
has read at ``flags + r * WORD``."""


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
