"""In which layers of vLLM one may write into the tensors that serve.

Storage and shape that stay equal prove nothing: a kernel may read a packed copy that no module shows, or the same
storage in another order. So this is a list, of what was read in the source of vLLM 0.33; and of what it allows,
`PlannedLoader` writes directly only what an update through load format has left bit for bit as it was.

| platform | layers | why |
|---|---|---|
| all | `RMSNorm` | nothing processes it |
| cuda | linear layers that are not quantised | ``UnquantizedLinearMethod.process_weights_after_loading`` does nothing |
| cuda | embeddings and heads that are not quantised | nor does that of ``UnquantizedEmbeddingMethod`` |
| cpu | both, if they multiply by ``torch.nn.functional.linear`` | oneDNN and SGL kernels read a packed copy |

Models with other attention than `Attention` are left out: multi-head latent attention keeps matrices that are made of a
linear layer's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from torch import nn


class TensorsInPlace:
    """The tensors of the layers on the list, looked up again only when something has changed.

    It is asked at each update, before the first byte; walking a model takes longer than comparing what was found: that
    each module has the same children, and each layer on the list the same tensors, of the same form and place, the same
    method of quantisation and, on the CPU, the same kernel.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._children: list[dict[str, Any]] = []
        self._named: list[nn.Module] = []
        self._states: list[dict[str, Any]] = []
        self._methods: list[Any] = []
        self._tables: list[dict[str, Any]] = []
        self._own: list[Tensor] = []
        self._forms: list[list[Any]] = []
        self._found: Mapping[str, Tensor] = {}
        self.layers: frozenset[str] = frozenset()
        """Paths of the layers on the list, as they were when `read` was called last."""

    def read(self) -> Mapping[str, Tensor]:
        """Return the tensors by name; the same object while nothing has changed."""
        if not self._is_unchanged():
            self._walk()
        return self._found

    def _is_unchanged(self) -> bool:
        return (
            bool(self._children)
            and sum(map(len, self._children)) == len(self._named)
            and _all(is_, _values(self._children), self._named)
            and sum(map(len, self._tables)) == len(self._own)
            and _all(is_, _values(self._tables), self._own)
            and _all(is_, _methods_of(self._states), self._methods)
            and _forms_of(self._own) == self._forms
        )

    def _walk(self) -> None:
        layers = list(layers_in_place(self._model))
        self._children = [module._modules for module in self._model.modules()]  # noqa: SLF001  (torch has no other name)
        self._named = list(_values(self._children))
        self._states = [vars(module) for _, module in layers]
        self._methods = list(_methods_of(self._states))
        self._tables = [
            table
            for _, module in layers
            for table in (module._parameters, module._buffers)  # noqa: SLF001
        ]
        self._own = list(_values(self._tables))
        self._forms = _forms_of(self._own)
        self._found = {
            f"{path}.{name}": tensor.data
            for path, module in layers
            for name, tensor in get_layer_tensors(module).items()
            if name not in SKIP_LOAD_TENSORS
        }
        self.layers = frozenset(path for path, _ in layers)


def _values(tables: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, tables))


def _methods_of(states: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable((state.get("quant_method"), state.get("cpu_linear")) for state in states)


def _forms_of(tensors: Iterable[Tensor | None]) -> list[list[Any]]:
    own = [tensor for tensor in tensors if tensor is not None]
    ways = (Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype"))
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (no other name; vLLM's parameters take ten times as long)
        return [list(map(way, own)) for way in ways]


def _all(holds: Any, found: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(map(holds, found, expected))


def layers_in_place(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each layer on the list."""
    modules = list(model.named_modules())
    if any(is_deferred_attention_layer(module) and type(module) is not Attention for _, module in modules):
        return
    for path, module in modules:
        if type(module) is RMSNorm or (_is_plain(module) and _multiplies_plainly(module)):
            yield path, module


def _is_plain(module: nn.Module) -> bool:
    method = type(getattr(module, "quant_method", None))
    return (isinstance(module, LinearBase) and method is UnquantizedLinearMethod) or (
        isinstance(module, VocabParallelEmbedding) and method is UnquantizedEmbeddingMethod
    )


def _multiplies_plainly(module: nn.Module) -> bool:
    if current_platform.is_cuda():
        return True
    if not current_platform.is_cpu():
        return False
    multiply = getattr(module, "cpu_linear", None)
    # The kernels that read a packed copy hold it in their closure.
    return callable(multiply) and not getattr(multiply, "__closure__", None)
