"""The weights of a module by name, read again at each update without walking it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
        self._entries: list[tuple[dict[str, Any], str, object]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._forms: list[tuple[torch.Size, torch.dtype]] = []

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the weights; the same object as long as all of them are the same, of the same shapes and dtypes."""
        if not self._unchanged():
            self._walk()
        forms = [(tensor.shape, tensor.dtype) for tensor in self._weights.values()]
        if forms != self._forms:
            self._forms = forms
            self._weights = dict(self._weights)
        return self._weights

    def _unchanged(self) -> bool:
        return (
            bool(self._sizes)
            and all(len(table) == size for table, size in self._sizes)
            and all(table.get(name) is value for table, name, value in self._entries)
        )

    def _walk(self) -> None:
        tables = [
            table
            for module in self._module.modules()
            for table in (module._modules, module._parameters, module._buffers)  # noqa: SLF001  (seen, not touched)
        ]
        self._sizes = [(table, len(table)) for table in tables]
        self._entries = [(table, name, value) for table in tables for name, value in table.items()]
        self._weights = dict(_named_weights(self._module))
        self._forms = []


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
