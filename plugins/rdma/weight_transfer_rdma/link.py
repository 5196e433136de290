"""What the link between two agents should yield, and whether it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weight_transfer_rdma.nixl import Transport

_DEVICE = re.compile(r"\b[a-z]\w*/(?P<device>[\w.-]+)(:(?P<port>\d+))?")
_LEAST_BYTES = 64 * 2**20  # less is gone before its rate can be told
_LEAST_SHARE = 0.5
_GIGA = 1e9


def doubt_about(transport: Transport) -> str | None:
    """Return a sentence about a transport that UCX may have taken for want of a better one."""
    if transport.kind == "tcp":
        return (
            f"UCX reads from the trainer over TCP ({transport.path}), which it takes without a word where it finds no "
            'better path; set transport = "tcp" if that is what you want, or the one that you expect.'
        )
    if transport.kind == "unknown":
        return (
            f"It is not known how UCX reads from the trainer ({transport.path}); look at the agent's log with "
            "WEIGHT_TRANSFER_TRACE=1."
        )
    return None


def link_rate(transport: Transport, root: Path = Path("/sys/class")) -> float | None:
    """Return what the kernel says of the devices that UCX chose, together.

    Args:
        transport: with UCX's words, which name devices as in ``rc_mlx5/mlx5_0:1`` and ``tcp/eth0``.
        root: the kernel's directory of devices.

    Returns:
        GB/s, or None if it says nothing.
    """
    ports = {
        (match["device"], match["port"] or "1") for match in _DEVICE.finditer(transport.path)
    }  # several paths: once
    rates = [
        _number(root / "infiniband" / device / "ports" / port / "rate", per_second=1e9)
        or _number(root / "net" / device / "speed", per_second=1e6)
        for device, port in ports
    ]
    return sum(rate for rate in rates if rate) or None


def _number(file: Path, per_second: float) -> float | None:
    """Return the number of bits that a file begins with, in GB/s."""
    try:
        bits = float(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # no such device, or one without a rate, such as loopback
        return None
    return bits * per_second / 8 / _GIGA if bits > 0 else None


def slow_link(nbytes: int, seconds: float, transport: Transport, rate: float | None, workers: int) -> str | None:
    """Return a sentence if reads were far slower than the link.

    Args:
        nbytes: bytes that were read.
        seconds: for which the worker did nothing but wait for them.
        transport: by which.
        rate: of the link, in GB/s; None if it is not known.
        workers: that share it.
    """
    if rate is None or nbytes < _LEAST_BYTES:
        return None
    share = rate / workers
    if nbytes / _GIGA >= _LEAST_SHARE * share * seconds:
        return None
    return (
        f"The worker read {nbytes / _GIGA:.2f} GB at {nbytes / seconds / _GIGA:.2f} GB/s by {transport.path}, less "
        f"than half of its share of the link ({rate:.2f} GB/s for {workers} workers); see whether others use the link, "
        "and whether both hosts use the devices that you mean (options interface and ucx)."
    )
