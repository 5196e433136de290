"""Options of the ``nccl`` backend: the table ``[weight_transfer.nccl]``."""

from __future__ import annotations

from typing import Literal

import attrs

from weight_transfer.authoring import to_bytes
from weight_transfer.errors import ConfigError


def _is_port(_instance: object, _attribute: object, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 65536:
        raise ConfigError(f"port: expected a TCP port, or 0 for a free one, got {value!r}.")


@attrs.frozen(kw_only=True)
class NcclOptions:
    """Options of the ``nccl`` backend. The trainer's count; workers are told what they need when they join.

    Attributes:
        transport: ``"nccl"`` for CUDA tensors, ``"gloo"`` for CPU tensors, ``"auto"`` by the device of the weights.
        address: the trainer's address, where it opens the rendezvous and the workers find it. Anything but a loopback
            address opens it to the network. It is open while members join, for those who prove to know a secret that
            only the control channel carries.
        port: TCP port of the rendezvous; 0 takes a free one.
        interface: network interface for gloo's connections, such as ``"eth0"``; default is the one of ``address`` on
            loopback, else the one of the host's name. NCCL reads ``NCCL_SOCKET_IFNAME`` instead.
        direct_bytes: tensors of at least this size travel from and into their own storage; smaller ones are packed.
    """

    transport: Literal["auto", "nccl", "gloo"] = attrs.field(
        default="auto", validator=attrs.validators.in_(("auto", "nccl", "gloo"))
    )
    address: str = "127.0.0.1"
    port: int = attrs.field(default=0, validator=_is_port)
    interface: str | None = None
    direct_bytes: int = attrs.field(default=8 * 2**20, converter=to_bytes)
