"""How the members of a group wait for each other, find each other's sockets and prove who they are."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.authoring import DIGEST_BYTES, keyed_digest
from weight_transfer.errors import HandshakeError
from weight_transfer_nccl.sockets import End, published_end
from weight_transfer_nccl.works import Work, errors_of_torch

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

POLL = 0.02  # seconds between two looks at the store
_FIRST_CONTEXT = 0  # the number under which gloo publishes the addresses of a group's first connections
_PROOF_TAG = 2**31 - 1  # of gloo's messages; those of updates begin with 0


def await_members(
    store: Any,
    rank: int,
    world_size: int,
    name_of: Callable[[int], str],
    require_joining: Callable[[], None],
    deadline: Deadline,
) -> None:
    """Wait until all members have said that they are here.

    Raises:
        TransferTimeoutError: some are missing, and named.
    """
    missing = [member for member in range(world_size) if member != rank]
    while True:
        missing = [member for member in missing if not store.check([here(member)])]
        if not missing:
            return
        require_joining()
        if deadline.expired:
            names = ", ".join(map(name_of, missing))
            raise deadline.timeout(f"waiting for {names} to join", backend="nccl", phase="init", peer=names)
        time.sleep(POLL)


def here(rank: int) -> str:
    """Return the key by which a member says that it is here."""
    return f"here/{rank}"


def gloo_ends(store: Any, world_size: int) -> dict[int, End]:
    """Return where the members of a gloo group listen; those that cannot be found out are left out."""
    keys = {rank: f"{_FIRST_CONTEXT}/{rank}" for rank in range(world_size)}
    found = {rank: published_end(store.get(key)) for rank, key in keys.items() if store.check([key])}
    return {rank: end for rank, end in found.items() if end is not None}


def prove_each_other(
    backend: Any, secret: str, rank: int, others: Set[int], name_of: Callable[[int], str], deadline: Deadline
) -> None:
    """See that at the other end of each of gloo's connections is the member for whom gloo takes it.

    Gloo itself takes whoever connects first.

    Raises:
        HandshakeError: somebody else is.
        PeerLostError: a connection has ended.
        TransferTimeoutError: it says nothing.
    """
    doing = "the members proved to each other who they are"
    shown = {other: torch.zeros(DIGEST_BYTES, dtype=torch.uint8) for other in others}
    ours = {other: _tensor(keyed_digest(secret, rank, other)) for other in others}
    work = Work(deadline, doing, timed=True)
    try:
        with errors_of_torch(deadline, doing):
            for other in others:
                work.add(backend.recv([shown[other]], other, _PROOF_TAG))
                work.add(backend.send([ours[other]], other, _PROOF_TAG))
        work.wait()
    finally:
        backend = None  # a traceback would keep it
    for other, tensor in shown.items():
        if not hmac.compare_digest(bytes(tensor.tolist()), keyed_digest(secret, other, rank)):
            raise HandshakeError(
                f"Somebody else has taken the place of {name_of(other)} in gloo's group; see who else uses this "
                "network, and let the members meet on another.",
                backend="nccl",
                phase="init",
                peer=name_of(other),
            )


def _tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)
