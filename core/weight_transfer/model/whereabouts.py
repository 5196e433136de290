"""Whether tensors still lie where they lay, and as they did: for ten thousand of them in about a millisecond.

A walk in Python over shapes, strides, dtypes and addresses takes as long as many a transfer. So addresses are read and
compared at the speed of C, and all else of a tensor by the guards that ``torch.compile`` has for its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards  # torch has no public way to compare many tensors in one call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_TOGETHER = 1024  # tensors


class Whereabouts:
    """Where some tensors lie, and their shapes, strides, dtypes and devices.

    Of one that wraps others, such as a ``DTensor``, nothing is looked at, which takes ten times as long as of another:
    give what it holds.

    Args:
        tensors: they are kept.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        unwrapped = (tensor for tensor in tensors if not is_traceable_wrapper_subclass(tensor))
        once = tuple({id(tensor): tensor for tensor in unwrapped}.values())
        self._groups = [_Group(once[begin : begin + _TOGETHER]) for begin in range(0, len(once), _TOGETHER)]

    @property
    def unchanged(self) -> bool:
        """Whether nothing of that has changed."""
        return all(group.unchanged for group in self._groups)


class _Group:
    """Some of the tensors: as many as a processor's cache holds for the second look, at addresses, after the guards'.

    Args:
        tensors: a tuple, which no call copies.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors = tensors
        self._placed = list(filter(_has_address, self._tensors))
        self._addresses = addresses_of(self._placed)
        self._forms = self._formed()
        self._are_alike = self._guard()

    @property
    def unchanged(self) -> bool:
        if not self._are_alike(*self._tensors):
            if self._formed() != self._forms:
                return False
            # The guards also know ``requires_grad``, which is nothing to us, and torch's modes.
            self._are_alike = self._guard()
        return addresses_of(self._placed) == self._addresses

    def _guard(self) -> Callable[..., bool]:
        guards: Any = TensorGuards(*self._tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        alike: Callable[..., bool] = guards.check
        return alike

    def _formed(self) -> list[list[Any]]:
        return [_of(way, self._tensors) for way in _FORM]


def addresses_of(tensors: list[torch.Tensor]) -> list[int]:
    """Return where the first element of each dense tensor lies."""
    return _of(torch.Tensor.data_ptr, tensors)


_FORM = (
    operator.attrgetter("shape"),
    torch.Tensor.stride,
    operator.attrgetter("dtype"),
    operator.attrgetter("device"),
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
)


def _of(way: Callable[[Any], Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (no public name; subclasses take ten times as long)
        return list(map(way, tensors))


def _has_address(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta
