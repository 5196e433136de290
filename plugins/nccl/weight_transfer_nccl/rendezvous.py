"""Where the members of a group meet: what the control channel tells them of it."""

from __future__ import annotations

from typing import Any

import attrs
import torch.distributed

dist: Any = torch.distributed  # what it holds depends on the build, so type checkers see half of it


@attrs.frozen(kw_only=True)
class Rendezvous:
    """Where and how the members meet.

    Attributes:
        address: the trainer's address.
        port: of its meeting place.
        secret: what members and trainer prove to know; it travels over the control channel alone.
        transport: ``"nccl"`` or ``"gloo"``.
        interface: for gloo.
    """

    address: str
    port: int
    secret: str = attrs.field(repr=False)
    transport: str
    interface: str | None = None


def first_line(error: BaseException) -> str:
    """Return an error of torch without the stack of its C++ code."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
