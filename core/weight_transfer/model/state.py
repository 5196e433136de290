"""What a module holds that belongs to a version: all of it by name, each memory once, or a refusal.

Parameters and persistent buffers are the module's own tensors. What else ``state_dict()`` has (extra state, scales that
a quantised layer adds when it saves itself) is *computed*: made anew each time it is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import attrs
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # what torch.compile asks of such tensors

from weight_transfer.errors import ConfigError
from weight_transfer.model.naming import joined, walk, without_wrappers

_DENSE = (torch.Tensor, nn.Parameter, nn.Buffer)


@attrs.frozen(eq=False)
class State:
    """The weights of a module at one moment.

    Attributes:
        weights: by name, without the names of wrappers; parameters before buffers; each memory once.
        aliases: further names of the same weights (tied parameters, parameters over one memory), and whose they are.
        tied: the tensors behind the aliases.
        computed: names of those that ``state_dict()`` computes: the next call may give other tensors.
    """

    weights: dict[str, torch.Tensor]
    aliases: dict[str, str]
    tied: tuple[torch.Tensor, ...]
    computed: frozenset[str]

    def is_same(self, other: State) -> bool:
        """Whether ``other`` holds the same tensor objects under the same names, in the same order."""
        mine, others = self.weights, other.weights
        return (
            list(mine) == list(others)
            and all(map(operator.is_, mine.values(), others.values()))
            and self.aliases == other.aliases
            and list(map(id, self.tied)) == list(map(id, other.tied))
        )


def state_of(module: nn.Module, ignore: Sequence[str] = ()) -> State:
    """Read a module.

    Args:
        module: whose weights.
        ignore: glob patterns of names to leave out.

    Raises:
        ConfigError: it holds something that cannot be read or sent; the sentence names it.
    """
    computed: dict[str, torch.Tensor] = {}
    if not any(_is_flat(part) for part in module.modules()) and any(map(_saves_more, module.modules())):
        computed = _computed(module)  # before the module's own: FSDP2 reshards when state_dict() is called
    weights: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    tied: list[torch.Tensor] = []
    names_of_memory: dict[object, str] = {}
    for name, tensor in [*_own(module), *computed.items()]:
        if any(fnmatchcase(name, pattern) for pattern in ignore):
            continue
        require_readable(name, tensor)
        known = weights.get(name)
        if known is not None and known is not tensor:
            if name in computed:
                continue  # a hook replaced what is saved; what the module computes with is sent
            raise ConfigError(f"Without the names of wrappers two weights are called {name!r}; unwrap the module.")
        first = names_of_memory.setdefault(memory_of(tensor), name)
        if first == name:
            weights[name] = tensor
        else:
            aliases[name] = first
            tied.append(tensor)
    return State(weights, aliases, tuple(tied), frozenset(computed.keys() & weights.keys()))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is elements in memory and nothing more: no subclass, not sparse, not without bytes."""
    return type(tensor) in _DENSE and tensor.layout is torch.strided and not tensor.is_meta


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard of this rank; of a tensor that is not sharded, the tensor itself."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor are not its values yet: those of ``conj()`` and its ``imag``."""
    return tensor.is_conj() or tensor.is_neg()


def memory_of(tensor: torch.Tensor) -> object:
    """Return a key that two tensors share if they are the same elements of the same memory."""
    if is_dense(tensor) and tensor.numel() and not is_lazy(tensor):
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    return id(tensor)


def copies_of(module: nn.Module, names: Iterable[str], ignore: Sequence[str] = ()) -> list[str]:
    """Return those of the computed weights called ``names`` that are mere copies: writing into them changes nothing."""
    one, other = state_of(module, ignore).weights, state_of(module, ignore).weights
    return [name for name in names if memory_of(one[name]) != memory_of(other[name])]


def require_readable(name: str, tensor: object) -> None:
    """Refuse what has no bytes of its own, or other bytes than its dtype and shape promise.

    Raises:
        ConfigError: it names the weight and what to do.
    """
    if not isinstance(tensor, torch.Tensor):
        what = f"is a {type(tensor).__name__}, not a tensor; if the other side does without it"
        raise ConfigError(f'State {name!r} {what}, leave it out: ignore=["{name}"].')
    problem = _problem_of(tensor)
    if problem:
        raise ConfigError(f"Weight {name!r} {problem}.")


def _problem_of(tensor: torch.Tensor) -> str:
    kinds = {kind.__name__ for kind in type(tensor).__mro__}
    if "UninitializedTensorMixin" in kinds:
        return "has no shape yet; run the lazy module once first"
    if tensor.is_meta or "FakeTensor" in kinds:
        return "lies on the meta device and has no bytes; load or materialise it first"
    if hasattr(tensor, "ds_id") and not tensor.numel():
        return "is partitioned by DeepSpeed ZeRO-3; gather it first, with deepspeed.zero.GatheredParameters"
    if "FlatParameter" in kinds:
        return "is a flat parameter of FSDP1, which mixes several weights; use FSDP2 (fully_shard)"
    if hasattr(tensor, "full_tensor"):
        return ""
    if tensor.layout is not torch.strided or tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        return f"is a {_kind(tensor)} tensor, whose bytes are not those of its shape; make it a plain one first"
    return lack_of_memory(tensor)


def lack_of_memory(tensor: torch.Tensor) -> str:
    """Say how much memory a dense tensor lacks, if its storage was resized; else nothing."""
    if not tensor.numel():
        return ""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needs, has = (tensor.storage_offset() + reach + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if has >= needs:
        return ""
    return f"has {has} bytes of memory and needs {needs}: its storage was resized; resize it back, and fill it, first"


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_quantized:
        return "quantised"
    return str(tensor.layout).removeprefix("torch.") if tensor.layout is not torch.strided else type(tensor).__name__


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, then persistent buffers, each under every name."""
    buffers: list[tuple[str, torch.Tensor]] = []
    for _, path, part in walk(module):
        for name, parameter in part._parameters.items():  # noqa: SLF001  (seen, not touched)
            if parameter is not None:
                yield joined(path, name), parameter
        transient = getattr(part, "_non_persistent_buffers_set", ())  # a script has none
        for name, buffer in part._buffers.items():  # noqa: SLF001
            if buffer is not None and name not in transient:
                buffers.append((joined(path, name), buffer))
    yield from buffers


def _is_flat(module: nn.Module) -> bool:
    """Whether FSDP1 wraps the module: its ``state_dict()`` would run collectives."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def _saves_more(module: nn.Module) -> bool:
    """Whether ``state_dict()`` may have more, or other names, than parameters and persistent buffers."""
    kind = type(module)
    return bool(
        kind._save_to_state_dict is not nn.Module._save_to_state_dict  # noqa: SLF001
        or kind.get_extra_state is not nn.Module.get_extra_state
        or (kind.state_dict is not nn.Module.state_dict and not isinstance(module, torch.jit.ScriptModule))
        or module._state_dict_hooks  # noqa: SLF001
        or module._state_dict_pre_hooks  # noqa: SLF001
    )


def _computed(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what ``state_dict()`` has and the module's own tensors are not, by name."""
    saved = module.state_dict(keep_vars=True)
    own = dict(_own(module))
    mine = {id(tensor) for tensor in own.values()} | {memory_of(tensor) for tensor in own.values()}
    paths = {path: plain for path, plain, _ in walk(module)}
    found = {}
    for key, value in saved.items():
        if value is None or (isinstance(value, torch.Tensor) and {id(value), memory_of(value)} & mine):
            continue  # nothing to send, or known under the name that the module itself has for it
        name = _plain_key(key, paths)
        if name not in own:
            found[name] = value
    return found


def _plain_key(key: str, paths: dict[str, str]) -> str:
    """Return a key of ``state_dict()`` without the names of wrappers."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return without_wrappers(joined(paths[path], key.removeprefix(path).lstrip(".")))
    return without_wrappers(key)
