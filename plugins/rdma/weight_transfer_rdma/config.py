"""Options of the ``rdma`` backend: the table ``[weight_transfer.rdma]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from weight_transfer.errors import ConfigError

_KEY = re.compile(r"[A-Z][A-Z0-9_]*")


def _is_ucx_table(_instance: object, _attribute: object, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if not _KEY.fullmatch(key) or key.startswith("UCX_") or not isinstance(value, str):
            raise ConfigError(
                f"ucx: expected UCX options without their UCX_ and their values as text, as in "
                f'RC_TIMEOUT = "100ms", got {key} = {value!r}.'
            )


@attrs.frozen(kw_only=True)
class RdmaOptions:
    """Options of the ``rdma`` backend. Each side reads its own; ``transport`` and ``interface`` must suit each other.

    Attributes:
        transport: how the weights must travel: ``"rdma"`` (InfiniBand, RoCE, EFA), ``"nvlink"``, ``"shm"`` (one kernel
            copies from process to process) or ``"tcp"``; anything else that UCX would take is refused. ``"auto"``
            takes the best that UCX finds, but not TCP for CUDA tensors.
        allow_tcp: lets ``"auto"`` take TCP for CUDA tensors, too.
        interface: network devices as UCX calls them, separated by commas, such as ``"mlx5_0:1,eth0"``; ``"all"`` for
            all. Default is loopback, and all RDMA devices with ``transport = "rdma"``. UCX authenticates nobody:
            whoever reaches a TCP port of an agent can read and write the weights, so name devices of a trusted
            network only.
        ucx: further UCX options by name without their ``UCX_``, such as ``RC_TIMEOUT = "100ms"``.
        link_rate: of the link between trainer and worker, in GB/s (10**9 bytes): a worker that reads at less than half
            of its share of it says so in the report. Default is what the kernel says of RDMA and network devices;
            without a number nothing is said, as for NVLink and shared memory.
        adopt: whether CPU weights move into shared memory at the first update, so that they are read from and into
            their own place; if not, they are copied through staging buckets on this side.
    """

    transport: Literal["auto", "rdma", "nvlink", "shm", "tcp"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "rdma", "nvlink", "shm", "tcp"))
    )
    allow_tcp: bool = False
    interface: str | None = None
    ucx: dict[str, str] = attrs.field(factory=dict, validator=_is_ucx_table)
    link_rate: float | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))
    adopt: bool = True
