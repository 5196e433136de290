"""A PEFT model's merged weights, computed one at a time while they are sent; PEFT itself is never imported."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.model.naming import walk, without_wrappers
from weight_transfer.model.resharding import Resharding
from weight_transfer.model.sharding import LocalShards
from weight_transfer.model.source import WeightSource, full_tensor, is_sharded
from weight_transfer.model.state import memory_of, require_readable

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.shards import Shard

_HOME = "peft.tuners.lora.layer"
_KINDS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")


class MergedLoraSource(WeightSource):
    """The weights of a LoRA model as ``merge_and_unload()`` would make them, bit by bit, without changing the model.

    Names are the base model's. What adapters touch is merged when its turn comes, on its own device, from the adapters
    that are active and not merged already, so there is never a second copy of more than one weight; what they do not
    touch is sent as it is, from ``modules_to_save`` the active adapter's module. Sharded weights and adapters (FSDP2)
    are gathered first: every trainer rank iterates.

    Args:
        model: a ``PeftModel`` with LoRA, or a model into which PEFT has put LoRA layers.

    Raises:
        ConfigError: the model has no LoRA layer, or one that cannot be merged like this (DoRA and other variants,
            quantised layers, other tuners); it is named. Adapters may change later, so reading may raise it, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts: list[_Part] = []
        self._manifest = Manifest(())
        self._resident: dict[str, Tensor] = {}
        self._untouched: dict[str, Tensor] = {}
        self._shards = LocalShards()
        self.manifest()

    def manifest(self) -> Manifest:
        """Walk the model anew, because adapters may have been switched; what FSDP2 has unsharded is resharded."""
        Resharding(self.model).reshard()
        self._parts = _parts(self.model)
        manifest = Manifest(
            (ParamMeta(part.name, dtype_name(part.tensor.dtype), part.tensor.shape) for part in self._parts),
            {alias: part.name for part in self._parts for alias in part.aliases},
        )
        if manifest != self._manifest:
            self._manifest = manifest
        untouched = {part.name: part.tensor for part in self._parts if not part.merges}
        known = self._untouched
        if [*untouched] != [*known] or not all(map(operator.is_, untouched.values(), known.values())):
            self._untouched = untouched
            self._resident = {name: tensor for name, tensor in untouched.items() if not is_sharded(tensor)}
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for part in self._parts:
            yield part.name, part.merged()

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield those called ``names`` alone; the others are not merged."""
        return ((part.name, part.merged()) for part in self._parts if part.name in names)

    def resident(self) -> Mapping[str, Tensor]:
        """Return the weights that no adapter touches."""
        return self._resident

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """Return those of the weights that no adapter touches."""
        return self._shards.of(self._untouched, self._resident)

    @property
    def device(self) -> str:
        return str(self._parts[0].tensor.device) if self._parts else "cpu"

    @property
    def reuses_memory(self) -> bool:
        """What is merged or gathered is new each time."""
        return False

    def __repr__(self) -> str:
        return f"MergedLoraSource({type(self.model).__name__})"

    @property
    def collective(self) -> bool:
        return any(is_sharded(tensor) for part in self._parts for tensor in part.tensors())


@attrs.frozen
class _Merge:
    """What one adapter of one layer adds to a weight: a product, or to a bias a bias."""

    layer: Any
    adapter: str
    bias: bool = False

    def tensors(self) -> Iterator[Tensor]:
        """Return the adapter's own weights."""
        for holder in (self.layer.lora_A, self.layer.lora_B):
            if self.adapter in holder:
                yield holder[self.adapter].weight
        for holder in (self.layer.lora_embedding_A, self.layer.lora_embedding_B):
            if self.adapter in holder:
                yield holder[self.adapter]

    def add_to(self, weight: Tensor) -> None:
        """Merge in place; the operations are PEFT's own, in its order."""
        if self.bias:
            weight += full_tensor(self.layer.lora_B[self.adapter].bias) * self.layer.scaling[self.adapter]
            return
        delta = type(self.layer).get_delta_weight(_Gathered(self.layer, self.adapter), self.adapter)
        weight += delta.to(weight.dtype) if len(self.layer.lora_embedding_A) else delta


class _Gathered:
    """A LoRA layer as its ``get_delta_weight`` sees it: the adapter's weights are whole, and it may replace them."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self._layer = layer
        for name in ("lora_A", "lora_B"):
            holder = getattr(layer, name)
            found = {adapter: SimpleNamespace(weight=full_tensor(holder[adapter].weight))} if adapter in holder else {}
            setattr(self, name, found)
        for name in ("lora_embedding_A", "lora_embedding_B"):
            holder = getattr(layer, name)
            setattr(self, name, {adapter: full_tensor(holder[adapter])} if adapter in holder else {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@attrs.frozen
class _Part:
    """A weight of the base model, and what is merged into it."""

    name: str
    tensor: Tensor
    aliases: list[str] = attrs.field(factory=list)
    merges: list[_Merge] = attrs.field(factory=list)

    def tensors(self) -> Iterator[Tensor]:
        """Return all that it is made of."""
        yield self.tensor
        for merge in self.merges:
            yield from merge.tensors()

    def merged(self) -> Tensor:
        with torch.no_grad():
            whole = full_tensor(self.tensor)
            if self.merges:
                if not is_sharded(self.tensor):
                    whole = whole.clone()
                for merge in self.merges:
                    merge.add_to(whole)
            return whole


def _parts(model: nn.Module) -> list[_Part]:
    """Return the base model's parameters and persistent buffers, tied ones once."""
    peft_model: Any = next((part for _, _, part in walk(model) if hasattr(part, "get_base_model")), None)
    found = _Walk()
    found.visit(model if peft_model is None else peft_model.get_base_model(), "")
    if not found.layers:
        raise ConfigError(
            f"MergedLoraSource needs a model with PEFT's LoRA layers, {type(model).__name__} has none; send the model."
        )
    found.note_merges()
    return list(found.parts.values())


class _Walk:
    """Finds the weights of a model and the LoRA layers around some of them."""

    def __init__(self) -> None:
        self.parts: dict[object, _Part] = {}
        self.layers: list[tuple[Any, str]] = []

    def visit(self, module: Any, name: str) -> None:
        """Take a module in, with what is below it."""
        if "base_layer" in module._modules:  # noqa: SLF001  (torch's own table; a getattr would find PEFT's delegates)
            self._take_layer(module, name)
        elif {"modules_to_save", "original_module"} <= module._modules.keys():  # noqa: SLF001
            self.visit(_saved(module, name), name)
        elif "token_adapter" in module._modules:  # noqa: SLF001
            raise _refusal(module, name)
        else:
            self._take(module, name)

    def _take(self, module: nn.Module, name: str) -> None:
        prefix = f"{name}." if name else ""
        transient = module._non_persistent_buffers_set  # noqa: SLF001  (torch offers no public way to ask)
        for table in (module._parameters, module._buffers):  # noqa: SLF001
            for key, tensor in table.items():
                if tensor is not None and key not in transient:
                    self._take_weight(without_wrappers(prefix + key), tensor)
        for key, child in module._modules.items():  # noqa: SLF001
            if child is not None:
                self.visit(child, prefix + key)

    def _take_weight(self, name: str, tensor: Tensor) -> None:
        require_readable(name, tensor)
        part = self.parts.setdefault(memory_of(tensor), _Part(name, tensor))
        if part.name != name:
            part.aliases.append(name)

    def _take_layer(self, layer: Any, name: str) -> None:
        kind = next((cls.__name__ for cls in type(layer).__mro__ if cls.__module__ == _HOME), None)
        if kind not in _KINDS:
            raise _refusal(layer, name)
        self.layers.append((layer, name))
        if kind != "ParamWrapper" and "base_layer" in layer.base_layer._modules:  # noqa: SLF001
            raise _refusal(layer.base_layer, name)
        self.visit(layer.base_layer, name)

    def note_merges(self) -> None:
        """Remember, once all weights are known, what the layers add to them."""
        for layer, name in self.layers:
            base = layer.get_base_layer()
            if type(layer).__name__.endswith("ParamWrapper"):
                self._note(layer, name, getattr(base, layer.parameter_name))
            else:
                self._note(layer, name, base.weight, getattr(base, "bias", None))

    def _note(self, layer: Any, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Remember what the layer's active adapters add to its base weight."""
        for adapter in layer.active_adapters:
            if adapter in layer.merged_adapters or not (adapter in layer.lora_A or adapter in layer.lora_embedding_A):
                continue
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            if variant is not None or getattr(layer, "use_dora", {}).get(adapter):
                raise _refusal(layer, name, "DoRA" if variant is None else type(variant).__name__)
            if getattr(layer.get_base_layer(), "groups", 1) > 1:
                raise _refusal(layer, name, "groups")
            self.parts[memory_of(weight)].merges.append(_Merge(layer, adapter))
            if getattr(layer, "lora_bias", {}).get(adapter):
                if bias is None:
                    raise ConfigError(f"{name}: adapter {adapter!r} has a bias (lora_bias), its base layer has none.")
                self.parts[memory_of(bias)].merges.append(_Merge(layer, adapter, bias=True))


def _saved(wrapper: Any, name: str) -> Any:
    """Return the module that counts: the active adapter's, else the original one."""
    active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
    if len(active) > 1:
        raise ConfigError(f"{name}: several active adapters ({', '.join(active)}) save this module; activate one.")
    return wrapper.modules_to_save[active[0]] if active else wrapper.original_module


def _refusal(module: Any, name: str, what: str = "") -> ConfigError:
    kind = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
    return ConfigError(
        f"{name}: MergedLoraSource does not merge {kind}{f' with {what}' if what else ''}; it knows plain LoRA of "
        "linear, embedding and convolution layers. Send model.merge_and_unload() of a copy instead."
    )
