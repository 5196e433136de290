"""Operations of torch as a dispatch mode sees them: what they write, and what they would return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from weight_transfer.model.strided import Strided


def on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation for the shape of its result: nothing that exists is written or read."""
    written = {id(tensor) for tensor in written_by(func, args, kwargs)}
    stand_ins: dict[int, torch.Tensor] = {}
    originals: dict[int, torch.Tensor] = {}

    def stand_in(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, torch.Tensor) or (value.is_meta and id(value) not in written):
            return value
        if id(value) not in stand_ins:
            new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            stand_ins[id(value)], originals[id(new)] = new, value
        return stand_ins[id(value)]

    result = func(*_mapped(stand_in, args), **_mapped(stand_in, kwargs))
    return _mapped(lambda value: originals.get(id(value), value), result)


def _mapped(call: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_mapped(call, each) for each in value])
    if isinstance(value, Mapping):
        return {key: _mapped(call, each) for key, each in value.items()}
    return call(value)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments that an operation writes."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    writes = [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    return list(tensors_in([given.get(name) for name in writes]))


def storage_key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def extent_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where elements of a tensor begin and end in its storage, in bytes."""
    size, view = tensor.element_size(), Strided.of(tensor)
    return view.offset * size, view.end * size


def operation_name(func: Any) -> str:
    return str(func).rpartition(".")[0]
