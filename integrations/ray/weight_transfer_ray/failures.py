"""What Ray raises, as errors of this library."""

from __future__ import annotations

from ray import exceptions

from weight_transfer.errors import PeerLostError, TransferError, TransferTimeoutError, WeightTransferError, extract

_START, _END = 400, 600  # characters of a foreign text that are kept; a traceback's last lines tell most
_LOST = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
)


def foreign(error: BaseException, peer: str, node: str, what: str) -> WeightTransferError:
    """Return an exception of Ray as one of this library.

    Args:
        error: what ``ray.get`` has raised.
        peer: the actor's name.
        node: where it was last seen.
        what: the call.
    """
    if isinstance(error, WeightTransferError):
        return error
    inner = getattr(error, "cause", None)  # of a RayTaskError: what the method has raised
    if isinstance(inner, WeightTransferError):
        return inner
    cause = f"{type(error).__name__}: {error}"
    known = extract(cause)
    if known is not None:
        return known
    if len(cause) > _START + _END:
        cause = f"{cause[:_START]} ... {cause[-_END:]}"
    if isinstance(error, exceptions.GetTimeoutError):
        return TransferTimeoutError(f"The actor on {node} did not answer {what} in time.", peer=peer, cause=cause)
    if isinstance(error, exceptions.ActorUnavailableError):
        return PeerLostError(
            f"The actor on {node} cannot be reached: Ray restarts it, or its node is away.", peer=peer, cause=cause
        )
    if isinstance(error, _LOST):
        for_good = isinstance(error, exceptions.ActorDiedError)
        return PeerLostError(f"The actor on {node} has died.", peer=peer, cause=cause, permanent=for_good)
    return TransferError(f"The actor on {node} failed in {what}.", peer=peer, cause=cause)
