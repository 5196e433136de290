"""The dtypes of the workers' weights, as they travel in the handshake for casts to ``"receiver"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from weight_transfer.errors import HandshakeError
from weight_transfer.model.abilities import offers

if TYPE_CHECKING:
    from weight_transfer.model.info import WeightTransferInitInfo
    from weight_transfer.model.loading import WeightLoader

_SEPARATOR = " and "


@runtime_checkable
class TypedLoader(Protocol):
    """A loader that knows the dtypes of what it loads into."""

    def dtypes(self) -> Mapping[str, str] | None:
        """Return the dtype's name of each of the worker's weights, under each of its names; None if it knows none."""


def dtypes_answer(info: WeightTransferInitInfo, loaders: Mapping[bool, WeightLoader]) -> dict[str, Any]:
    """Return what a worker's answer to its handshake says of its weights: their names by dtype, or nothing.

    Args:
        info: what the trainer asks.
        loaders: for checkpoint format (True) and kernel format (False).
    """
    loader = loaders[info.report_dtypes == "checkpoint"]
    dtypes = loader.dtypes() if info.report_dtypes is not None and offers(loader, TypedLoader) else None
    if dtypes is None:
        return {}
    names: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        names.setdefault(dtype, []).append(name)
    return {"dtypes": names}


def joint_answer(answers: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the answer of several ranks as one; None if one of them does not know."""
    names: dict[str, dict[str, None]] = {}
    for answer in answers:
        dtypes = answer.get("dtypes") if isinstance(answer, Mapping) else None
        if not isinstance(dtypes, Mapping):
            return None
        for dtype, some in dtypes.items():
            names.setdefault(dtype, {}).update(dict.fromkeys(some))
    return {"dtypes": {dtype: list(some) for dtype, some in names.items()}}


def dtypes_by_name(answer: object, peer: str) -> dict[str, str] | None:
    """Return a worker's dtypes by name; of a weight whose ranks differ, all of them. None if it does not know.

    Raises:
        HandshakeError: it answered something else.
    """
    if not isinstance(answer, dict) or "dtypes" not in answer:
        return None
    names = answer["dtypes"]
    if not isinstance(names, dict) or not all(
        isinstance(some, list) and all(isinstance(name, str) for name in some) for some in names.values()
    ):
        raise HandshakeError("The worker's answer holds no lists of names by dtype.", peer=peer, phase="init")
    found: dict[str, str] = {}
    for dtype, some in names.items():
        for name in some:
            found[name] = f"{found[name]}{_SEPARATOR}{dtype}" if name in found else dtype
    return found


def common_dtypes(
    workers: Mapping[str, Mapping[str, str] | None], called: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return the dtype on which all workers agree, by name.

    Args:
        workers: dtypes by name, by the worker's address; None for one that does not know.
        called: the names of each weight, by the one under which it travels: several, if it is tied.

    Raises:
        HandshakeError: a worker does not know, lacks a weight, or differs from another.
    """
    found: dict[str, str] = {}
    for name, names in called.items():
        told: dict[str, str] = {}
        for address, dtypes in workers.items():
            if dtypes is None:
                raise _refusal(
                    f"{address} does not know the dtypes of its weights, because a loader of its own takes them or its "
                    "server does not tell; name the dtype in cast instead",
                    address,
                )
            known = [dtypes[each] for each in names if each in dtypes]
            if not known:
                raise _refusal(
                    f"{address} has no weight {name!r}; rename it on the trainer, or name its dtype", address
                )
            for dtype in known:
                told.setdefault(dtype, address)
        if len(told) > 1 or any(_SEPARATOR in dtype for dtype in told):
            differ = ", ".join(f"{dtype} at {address}" for dtype, address in told.items())
            raise _refusal(f"{name!r} is {differ}; name one dtype for all", next(iter(told.values())))
        found[name] = next(iter(told))
    return found


def _refusal(what: str, peer: str) -> HandshakeError:
    return HandshakeError(f'cast to "receiver": {what}.', peer=peer, phase="init")
