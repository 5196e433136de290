"""Where the members of a group meet: a store that the trainer opens, whose keys begin with a secret."""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
import torch.distributed

from weight_transfer.errors import HandshakeError, PeerLostError

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

dist: Any = torch.distributed  # what it holds depends on the build, so type checkers see half of it


@attrs.frozen(kw_only=True)
class Rendezvous:
    """Where and how the members meet.

    Attributes:
        address: the trainer's address.
        port: of its store.
        secret: prefix of all keys in the store; without it nobody can join.
        transport: ``"nccl"`` or ``"gloo"``.
        interface: for gloo.
    """

    address: str
    port: int
    secret: str = attrs.field(repr=False)
    transport: str
    interface: str | None = None


def open_store(address: str, port: int) -> tuple[Any, int]:
    """Open the trainer's store on ``address`` alone, not on all interfaces as torch does; return it and its port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise HandshakeError(
            f"The trainer cannot open its rendezvous on {address} port {port}; see [weight_transfer.nccl].",
            backend="nccl",
            phase="init",
            cause=str(error),
        ) from error
    bound = listener.getsockname()[1]
    store = dist.TCPStore(address, bound, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, bound


def reach_store(meeting: Rendezvous, deadline: Deadline) -> Any:
    """Connect to the trainer's store. A host that stands still is waited for without end: call it on a thread."""
    timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))
    try:
        return dist.TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        message = f"The trainer's rendezvous at {meeting.address} port {meeting.port} cannot be reached."
        raise PeerLostError(message, backend="nccl", phase="init", peer="trainer", cause=first_line(error)) from error


def new_secret() -> str:
    """Return 128 random bits as text."""
    return secrets.token_hex(16)


def first_line(error: BaseException) -> str:
    """Return an error of torch without the stack of its C++ code."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
