"""What vLLM raises, as errors of this library. The texts are those of vLLM 0.33."""

from __future__ import annotations

from weight_transfer.errors import (
    HandshakeError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
    extract,
)

_LONGEST = 2000  # characters of a foreign text that are kept
_GONE = ("EngineDeadError", "RayActorError", "ActorUnavailableError", "ConnectionError")
_LATE = ("TimeoutError", "GetTimeoutError")
_DEAD = ("EngineCore encountered an issue", "The server had an error while processing", "Executor failed")


def failure(text: str, peer: str) -> WeightTransferError:
    """Return the error that a text of vLLM tells of: a worker's own, if it carries one.

    Args:
        text: an exception's text, or a server's answer.
        peer: the server's address.
    """
    known = extract(text)
    if known is not None:
        return known
    cause = text[:_LONGEST]
    if any(words in text for words in _DEAD):
        return PeerLostError("vLLM's engine has died; start it again.", peer=peer, cause=cause)
    if "Weight transfer not configured" in text:
        return HandshakeError(
            "vLLM was started without weight transfer; start it with weight-transfer-vllm installed and "
            """--weight-transfer-config '{"backend": "wt_NAME"}', NAME being the trainer's backend.""",
            peer=peer,
            cause=cause,
        )
    return TransferError("vLLM failed.", peer=peer, cause=cause)


def foreign(error: BaseException, peer: str) -> WeightTransferError:
    """Return an exception of vLLM, of Ray or of a client as one of this library."""
    if isinstance(error, WeightTransferError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    known = extract(text)
    if known is not None:
        return known
    if kinds & set(_GONE):
        return PeerLostError("vLLM's engine has died; start it again.", peer=peer, cause=text[:_LONGEST])
    if kinds & set(_LATE):
        return TransferTimeoutError("vLLM did not answer in time.", peer=peer, cause=text[:_LONGEST])
    return failure(text, peer)
