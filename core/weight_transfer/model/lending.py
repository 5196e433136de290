"""Weights are lent to a loader for the length of one call.

The memory behind them is the trainer's, or a bucket that is filled again. A loader that has not loaded them when it
returns, or that keeps them, would end up with other weights than those of the version that is published; so it is
refused.
"""

from __future__ import annotations

import gc
import inspect
import operator
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.errors import ConfigError, TransferError

if TYPE_CHECKING:
    Weights = list[tuple[str, torch.Tensor]]

_LATER = (Iterator, AsyncIterator, Awaitable, Future)


def require_eager(call: Callable[..., Any], role: str) -> None:
    """Raise if calling it would only make something that does the work later.

    Args:
        call: what the user gave.
        role: as what, such as ``"load_weights"``.

    Raises:
        ConfigError: it is a generator function or a coroutine function.
    """
    for function in (call, vars(type(call)).get("__call__")):  # of an object that is callable
        for kind, test in (
            ("a generator function", inspect.isgeneratorfunction),
            ("a coroutine function", inspect.iscoroutinefunction),
            ("an asynchronous generator function", inspect.isasyncgenfunction),
        ):
            if test(function):
                raise ConfigError(
                    f"{role}={_name(call)} is {kind}: calling it does nothing yet. Give a plain function that is done "
                    "when it returns."
                )


def require_done(result: object, call: Callable[..., Any], role: str) -> None:
    """Raise if what a call returned is work that is still to be done.

    Raises:
        TransferError: it is a generator or another iterator, a coroutine or another awaitable, or a future.
    """
    if isinstance(result, _LATER):
        kind = type(result).__name__
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
        raise TransferError(
            f"{role}={_name(call)} returned a {kind}, so it has not done its work; it must be done when it returns.",
            phase="update",
        )


def lend(weights: Weights, load_weights: Callable[[Weights], object]) -> object:
    """Call a loader, see that it is done and has let go of the tensors, and return what it has returned.

    Raises:
        TransferError: it is not done, or has kept a tensor, a view of it, or its memory.
    """
    before = _references(weights)
    result = load_weights([(name, tensor) for name, tensor in weights])
    require_done(result, load_weights, "load_weights")
    if _kept(weights, before):
        gc.collect()  # a cycle, such as that of an exception that was caught, holds nothing on purpose
        if names := _kept(weights, before):
            raise TransferError(
                f"load_weights={_name(load_weights)} has kept {names[0]!r} ({len(names)} tensors in all) beyond its "
                "call. Their memory is the transfer's and will hold other bytes; copy what is to be kept, as with "
                "param.copy_(tensor) or tensor.clone(), or say so: load_weights.retains = True.",
                phase="update",
            )
    return result


def private_copies(weights: Weights) -> Weights:
    """Return copies, for a loader that may write into what it is given, where the memory is not this worker's alone."""
    return [(name, tensor.clone()) for name, tensor in weights]


def _references(weights: Weights) -> list[tuple[int, ...]]:
    """Count, for each tensor, what refers to it and to its storage."""
    return [_references_to(tensor, tensor.untyped_storage()) for _, tensor in weights]


def _references_to(tensor: torch.Tensor, storage: torch.UntypedStorage) -> tuple[int, ...]:
    tensors: int = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001  (as in `export`)
    return sys.getrefcount(tensor), sys.getrefcount(storage), tensors


def _kept(weights: Weights, before: list[tuple[int, ...]]) -> list[str]:
    now = _references(weights)
    return [name for (name, _), was, is_ in zip(weights, before, now, strict=True) if any(map(operator.gt, is_, was))]


def _name(call: Callable[..., Any]) -> str:
    return getattr(call, "__qualname__", None) or type(call).__qualname__
