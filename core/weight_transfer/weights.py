"""The weights of a module by name, read again at each update without walking it again."""

from __future__ import annotations

import operator
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import nn


class ModuleWeights:
    """The parameters and persistent buffers of a module, tied ones once, under the names of ``state_dict()``.

    Walking a model with ten thousand parameters takes longer than many a transfer of them, so the walk is kept: it is
    repeated only if a module, parameter or buffer was added, removed or replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._weights: dict[str, torch.Tensor] = {}
        self._tables: list[dict[str, Any]] = []
        self._filled: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._shapes: list[torch.Size] = []
        self._dtypes: list[torch.dtype] = []

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the weights; the same object as long as all of them are the same, of the same shapes and dtypes."""
        if not self._unchanged():
            self._walk()
        tensors = self._weights.values()
        if not (
            _all(operator.eq, map(_shape, tensors), self._shapes)
            and _all(operator.is_, map(_dtype, tensors), self._dtypes)
        ):
            self._remember_forms()
        return self._weights

    def _unchanged(self) -> bool:
        """Compare what the module's tables hold, without creating an object per weight."""
        return (
            bool(self._tables)
            and sum(map(len, self._tables)) == len(self._values)
            and _all(operator.is_, chain.from_iterable(map(dict.values, self._filled)), self._values)
            and _all(operator.eq, chain.from_iterable(self._filled), self._names)
        )

    def _walk(self) -> None:
        self._tables = [
            table
            for module in self._module.modules()
            for table in (module._modules, module._parameters, module._buffers)  # noqa: SLF001  (seen, not touched)
        ]
        self._filled = [table for table in self._tables if table]
        self._names = list(chain.from_iterable(self._filled))
        self._values = list(chain.from_iterable(map(dict.values, self._filled)))
        self._weights = dict(_named_weights(self._module))
        self._remember_forms()

    def _remember_forms(self) -> None:
        self._weights = dict(self._weights)
        self._shapes = [tensor.shape for tensor in self._weights.values()]
        self._dtypes = [tensor.dtype for tensor in self._weights.values()]


_shape = operator.attrgetter("shape")
_dtype = operator.attrgetter("dtype")


def _all(holds: Callable[[Any, Any], bool], found: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(map(holds, found, expected))


def _named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set  # noqa: SLF001  (torch offers no public way to ask)
    }
    for name, buffer in module.named_buffers():
        if name not in transient:
            yield name, buffer
