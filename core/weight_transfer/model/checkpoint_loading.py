"""What a worker does with checkpoint-format weights: hand them to the model's own loader."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.given import GivenLoader
from weight_transfer.model.lending import require_done, require_eager
from weight_transfer.model.loading import KernelFormatLoader, WeightLoader, Weights
from weight_transfer.model.manifest import ParamMeta, dtype_name
from weight_transfer.model.naming import walk
from weight_transfer.model.targets import NO_TARGETS, own_targets, scatter
from weight_transfer.model.weights import ModuleWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


class CheckpointFormatLoader:
    """Hands checkpoint-format weights to a model's own loader, with a layerwise stage behind it.

    When the last parameter of a layer has arrived, ``process_weights_after_loading(layer)`` runs, so that quantising
    or repacking needs the extra memory of one layer and not of the model. A layer is what a numbered part of the
    parameter's name points to (``model.layers.3``), else the module that owns the parameter.

    Args:
        load_weights: any callable that takes ``[(name, tensor), ...]`` in checkpoint format, such as a vLLM model's
            ``load_weights``. It is called several times per update. What else it may offer: see `GivenLoader`.
        model: needed with ``process_weights_after_loading``, and to see that all of its parameters were loaded.
        process_weights_after_loading: called once per layer and update with the layer's module. Partial updates must
            then hold whole layers.
        ignore: glob patterns of the model's parameters that nobody has to load.
    """

    _LAYER = re.compile(r"^(.*?\.\d+)\.")

    def __init__(
        self,
        load_weights: Callable[[Weights], object],
        model: nn.Module | None = None,
        process_weights_after_loading: Callable[[nn.Module], object] | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        if process_weights_after_loading is not None and model is None:
            raise ValueError("process_weights_after_loading needs the model whose layers it is to process")
        if process_weights_after_loading is not None:
            require_eager(process_weights_after_loading, "process_weights_after_loading")
        self._given = GivenLoader(load_weights)
        self._model = model
        self._ignore = ignore
        self._process = process_weights_after_loading
        self._missing: Counter[str] = Counter()
        self._sizes: Mapping[str, int] = {}
        self._whole: Mapping[str, int] = {}
        self._modules: dict[str, nn.Module] = {}
        self._partial = False
        self._left: Collection[str] = ()

    @property
    def disturbs(self) -> bool:
        return self._given.disturbs

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._given.warnings

    def leave(self, names: Collection[str]) -> None:
        """Leave some of the model's parameters to somebody else from now on; they are missing from no update."""
        self._left = names

    def begin(self, manifest: Manifest) -> None:
        self._given.begin(manifest)
        self._partial = manifest.partial
        self._missing = Counter(self.layer_of(param.name) for param in manifest.params)
        self._sizes = self._whole if manifest.partial else dict(self._missing)
        if self._process:
            assert self._model is not None
            self._require_whole_layers()
            self._modules = {path: module for _, path, module in walk(self._model)}  # of wrappers, what they wrap
            for layer in self._missing:
                self._module(layer)

    def __call__(self, weights: Weights) -> None:
        if self._process is None:
            self._given(weights)
            return
        part: Weights = []
        for name, tensor in weights:
            part.append((name, tensor))
            layer = self.layer_of(name)
            self._missing[layer] -= 1
            if not self._missing[layer]:
                self._given(part)
                part = []
                require_done(self._process(self._module(layer)), self._process, "process_weights_after_loading")
        if part:
            self._given(part)

    def finish(self) -> None:
        if self._model is not None and not self._partial:
            self._given.require_all(self._model, self._ignore, self._left)
        self._given.finish()
        self._whole = self._sizes

    def abort(self, reason: str, touched: bool) -> None:
        self._given.abort(reason, touched)

    def targets(self, manifest: Manifest) -> Targets:
        """Return those that the given loader offers; none if layers are processed, which takes whole ones."""
        return self._given.targets(manifest) if self._process is None else NO_TARGETS

    def landed(self, manifest: Manifest) -> Targets:
        """Return the given loader's targets: what else it does with weights cannot be seen."""
        return self.targets(manifest)

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return those that the given loader offers; see `targets`."""
        return self._given.destinations() if self._process is None else None

    def _require_whole_layers(self) -> None:
        """Refuse a part of a layer: what it does not hold has been processed already, and would be once more."""
        for layer, count in self._missing.items():
            if count != self._sizes.get(layer):
                example = f': only=["{layer}.*"]' if layer else ""
                raise ManifestMismatchError(
                    f"Some weights of layer {layer!r} came without the others, which process_weights_after_loading has "
                    f"processed already; send whole layers{example}.",
                    phase="update",
                )

    @classmethod
    def layer_of(cls, name: str) -> str:
        """Return the path of the layer to which the parameter called ``name`` belongs."""
        match = cls._LAYER.match(name)
        return match[1] if match else name.rpartition(".")[0]

    def _module(self, layer: str) -> nn.Module:
        module = self._modules.get(layer)
        if module is None:
            raise ManifestMismatchError(
                f"The update has parameters of layer {layer!r}, which the worker's model lacks; "
                "process_weights_after_loading needs checkpoint names that match the model's modules.",
                phase="update",
            )
        return module


def loader_for(
    model: nn.Module,
    load_weights: Callable[[Weights], object] | None,
    process_weights_after_loading: Callable[[nn.Module], object] | None,
    ignore: Sequence[str] = (),
) -> Mapping[bool, WeightLoader]:
    """Return the loaders for checkpoint format (True) and kernel format (False).

    For checkpoint format that is ``load_weights``, else the model's own ``load_weights`` method, else a copy by name.
    """
    kernel = KernelFormatLoader(model, ignore)
    load = load_weights or getattr(model, "load_weights", None)
    if load is None and process_weights_after_loading is None:
        return {True: kernel, False: kernel}
    load = load or _CopyByName(model, ignore)
    return {True: CheckpointFormatLoader(load, model, process_weights_after_loading, ignore), False: kernel}


class _CopyByName:
    """The default behind the layerwise stage: copies into the parameters that the model has at that moment."""

    def __init__(self, model: nn.Module, ignore: Sequence[str]) -> None:
        self._kernel = KernelFormatLoader(model, ignore)
        self._weights = ModuleWeights(model, ignore)

    def begin(self, manifest: Manifest) -> None:
        self._kernel.begin(manifest)

    def __call__(self, weights: Weights) -> None:
        targets = self._weights.read()
        for name, tensor in weights:
            for taker in self._kernel.takers[name]:
                target = targets.get(taker)
                if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
                    sent = ParamMeta(name, dtype_name(tensor.dtype), tensor.shape)
                    raise ManifestMismatchError(
                        f"{sent} was sent, but {taker!r} of the worker's model is another since this update began; "
                        "process_weights_after_loading may change no layer but its own.",
                        phase="update",
                    )
                scatter(tensor, own_targets(taker, target))
