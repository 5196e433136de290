"""A vLLM model layer by layer, on top of vLLM's layerwise reload."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    _get_original_loader,
    _layerwise_process,
    _place_kernel_tensors,
)
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, materialize_layer
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

import weight_transfer as wt
from weight_transfer_vllm.in_place import TensorsInPlace

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

_MAPS = SKIP_LOAD_TENSORS - {"e_score_correction_bias"}
"""Buffers that say which experts a rank has; that one is a weight."""

Weights = list[tuple[str, "Tensor"]]


class VllmLayers:
    """`ServedLayers` of a vLLM model. A layer is a module that owns weights.

    Args:
        model: the model.
        model_config: vLLM's configuration of it.
    """

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model = model
        self._config = model_config
        self._modules = dict(model.named_modules())
        self._in_place = TensorsInPlace(model)
        self._listed: frozenset[str] = frozenset()
        self._verdicts: dict[str, bool] = {}  # of layers on the list, whether processing leaves their bits

    @contextmanager
    def recorded(self) -> Iterator[tuple[Callable[[Weights], object], Mapping[str, Tensor]]]:
        before = {name: id(tensor) for name, tensor in self._tensors()}
        initialize_layerwise_reload(self._model)
        try:
            targets = dict(self._tensors())
            for name, tensor in targets.items():
                if name.rpartition(".")[2] not in SKIP_LOAD_TENSORS:
                    tensor.weight_loader = _get_original_loader(tensor)  # type: ignore[attr-defined]
            yield self.run_loader, targets
        finally:
            self._put_back()
        changed = [name for name, tensor in self._tensors() if before.get(name) != id(tensor)]
        if changed:
            raise wt.TransferError(
                f"The model's loader has replaced {changed[0]!r} ({len(changed)} tensors in all) while it ran without "
                "bytes; start vLLM anew, and have it load whole weights by itself: weight_transfer_recorded = false."
            )

    def layer_of(self, name: str) -> str:
        return name.rpartition(".")[0]

    def required(self) -> Collection[str]:
        """Return the parameters, except those of attention, whose scales may be missing; vLLM asks for the same."""
        if self._config.quantization is not None:
            return ()
        left = self.by_loader()
        return {name for name, _ in self._model.named_parameters() if self.layer_of(name) not in left}

    def optional(self) -> Collection[str]:
        """Return what no checkpoint has: buffers that are not persistent, and maps of experts."""
        return {
            f"{path}.{name}"
            for path, module in self._modules.items()
            for name in SKIP_LOAD_TENSORS | module._non_persistent_buffers_set  # noqa: SLF001  (torch has no other name)
        }

    def split(self) -> tuple[int, int]:
        group = get_tp_group()
        return group.rank_in_group, group.world_size

    def state(self) -> object:
        """Return which experts are here."""
        return [
            (path, name, tensor.tolist())
            for path, module in self._modules.items()
            for name, tensor in get_layer_tensors(module).items()
            if name in _MAPS
        ]

    def by_loader(self) -> Mapping[str, str]:
        return {
            path: "vLLM loads the scales of attention after everything else"
            for path, module in self._modules.items()
            if is_deferred_attention_layer(module)
        }

    def in_place(self) -> Mapping[str, Tensor]:
        return self._in_place.read()

    def open(self, directly: Collection[str]) -> None:
        self._listed = self._in_place.layers
        initialize_layerwise_reload(self._model)
        for path in directly:
            _leave_load_format(self._modules[path])

    def begin_layer(self, layer: str) -> Mapping[str, Tensor]:
        module = self._modules[layer]
        materialize_layer(module, LAYERWISE_INFO[module])
        return {f"{layer}.{name}": tensor.data for name, tensor in get_layer_tensors(module).items()}

    def end_layer(self, layer: str) -> bool:
        """Process the layer; compare it the first time only.

        What processing does with a layer on the list follows from the list's reasons and not from its weights. So one
        that it has changed is never written directly, even if another update leaves its bits by chance; and one that it
        has not changed need not be copied and compared at each update.
        """
        module = self._modules[layer]
        loaded = {}
        if layer in self._listed and layer not in self._verdicts:
            loaded = {name: tensor.detach().clone() for name, tensor in get_layer_tensors(module).items()}
        _layerwise_process(module, LAYERWISE_INFO[module])
        if loaded:
            serving = get_layer_tensors(module)
            self._verdicts[layer] = all(
                name in loaded and _same_bits(loaded[name], tensor) for name, tensor in serving.items()
            )
        return layer in self._listed and self._verdicts.get(layer, False)

    def run_loader(self, weights: Weights) -> object:
        """Run the model's own loader; return the names that it returns. In load format it keeps the tensors."""
        with disable_mtp_completeness_check():
            return self._model.load_weights(weights)  # type: ignore[operator]

    def load(self, weights: Weights) -> None:
        """Give the loader copies: layerwise reload keeps what it is given until the layer is complete."""
        self.run_loader([(name, tensor.clone()) for name, tensor in weights])

    def finish(self) -> None:
        self._require_complete()
        finalize_layerwise_reload(self._model, self._config)

    def restore(self, reason: str) -> None:
        logger.warning("putting back the layers whose weights had not come when the update failed: %s", reason)
        self._put_back()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the model holds, each tensor under its first name."""
        seen = set()
        for path, module in self._modules.items():
            for name, tensor in get_layer_tensors(module).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor

    def _put_back(self) -> None:
        """Give the modules that are in load format the tensors back that served."""
        for module in self._modules.values():
            _leave_load_format(module)
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload  # noqa: SLF001  (the reload's own)

    def _require_complete(self) -> None:
        """Raise if a layer of the model's own loader got a part of its weights only, of which vLLM only logs."""
        for path, module in self._modules.items():
            info = LAYERWISE_INFO.get(module)
            if info is not None and info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0):
                raise wt.ManifestMismatchError(
                    f"{info.load_numel} of the {info.load_numel_total} elements of layer {path!r} were loaded; send "
                    "all that it is made of.",
                    phase="update",
                )


def _leave_load_format(module: nn.Module) -> None:
    """Give a module the tensors back that served, with the loaders that they had."""
    info = LAYERWISE_INFO.get(module)
    if info is None or not info.can_load():
        return
    if info.kernel_tensors is not None:
        _place_kernel_tensors(module, info)
    info.reset()
    for tensor in get_layer_tensors(module).values():
        if hasattr(tensor, "weight_loader"):  # some tensors are never on meta, and the reload has wrapped theirs, too
            tensor.weight_loader = _get_original_loader(tensor)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)
