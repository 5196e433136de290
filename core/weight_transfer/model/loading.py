"""What a worker does with weights that arrive: copy them in place, or hand them to the model's own loader."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from weight_transfer.errors import ConfigError, ManifestMismatchError
from weight_transfer.model.lending import lend, require_done, require_eager
from weight_transfer.model.manifest import ParamMeta, dtype_name
from weight_transfer.model.naming import walk
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Target
from weight_transfer.model.source import is_sharded
from weight_transfer.model.targets import as_bits, local_of, own_targets, scatter
from weight_transfer.model.weights import ModuleWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets

Weights = list[tuple[str, "Tensor"]]


class WeightLoader(Protocol):
    """Takes weights part by part."""

    def begin(self, manifest: Manifest) -> None:
        """An update begins; changes nothing yet. Raise ``ManifestMismatchError`` if it cannot fit."""

    def __call__(self, weights: Weights) -> None:
        """Load these weights. The tensors are only valid during the call."""

    def finish(self) -> None:
        """Every parameter of the manifest has been loaded."""


@runtime_checkable
class InPlaceLoader(Protocol):
    """A loader that only copies, and can therefore say where to."""

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return the worker's own tensors by name, each of the shape and dtype of the manifest that began.

        Of weights that it keeps in parts there is none; None if it keeps none whole.
        """


@runtime_checkable
class InPlaceTarget(Protocol):
    """What a receiver's ``load_weights`` offers beside being called; see `destinations_of`."""

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return the worker's own tensors by name, if the loader only copies."""

    def write_in_place(self) -> None:
        """Say that bytes are about to be written there; raises after the deadline or an abort."""


def destinations_of(load_weights: Callable[[Weights], object]) -> Mapping[str, Tensor] | None:
    """Return where an engine may write the weights directly, by name; None if it may not.

    Before each batch of writes the engine calls ``load_weights.write_in_place()``; afterwards it hands the written
    tensors themselves to ``load_weights``. A plain callable, such as a model's ``load_weights``, gives None.
    """
    return load_weights.destinations() if isinstance(load_weights, InPlaceTarget) else None


class KernelFormatLoader:
    """Copies into the parameters and persistent buffers of a model by name; shapes and dtypes must be equal.

    Of parameters that are sharded over several ranks (``DTensor``) this rank's shards are kept.

    Args:
        model: its storages stay where they are, so captured CUDA graphs and compiled code keep working.
        ignore: glob patterns of names that are not to be loaded.
    """

    def __init__(self, model: nn.Module, ignore: Sequence[str] = ()) -> None:
        self._weights = ModuleWeights(model, ignore)
        self._read: Mapping[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._parts: dict[str, list[Target]] = {}
        self._twins: list[tuple[Tensor, Tensor]] = []
        self._targets: Targets | None = None
        self._sharded: list[Tensor] = []
        self._forms: list[Sequence[object]] = []
        self._left: Collection[str] = ()
        self._checked: Manifest | None = None
        self._begun: Manifest | None = None
        self._looks = 0
        self.takers: Mapping[str, tuple[str, ...]] = {}
        """Names in the model by names in the manifest: several for weights that are tied on the trainer alone."""

    @property
    def looks(self) -> int:
        """How often the model was looked at anew: whenever a weight was moved, among other reasons."""
        return self._weights.looks

    def begin(self, manifest: Manifest) -> None:
        self._begun = None
        self._check(manifest)
        self._begun = manifest

    def targets(self, manifest: Manifest) -> Targets:
        if self._begun is not manifest:
            self._check(manifest)
        if self._targets is None:
            whole = {name: [Target(Region.whole(tensor.shape), tensor)] for name, tensor in self._whole.items()}
            self._targets = whole | self._parts
        return self._targets

    def leave(self, names: Collection[str]) -> None:
        """Leave some of the model's weights to somebody else from now on; they are missing from no update."""
        if names != self._left:
            self._left, self._checked = names, None

    def weights(self) -> Mapping[str, Tensor]:
        """Return the model's weights by name, each memory once.

        Raises:
            ManifestMismatchError: the model holds something that cannot be written; the sentence names it.
        """
        try:
            read = self._weights.read()
            if self._looks != self._weights.looks:  # weights that have moved may share memory now
                self._weights.require_writable()
                self._looks = self._weights.looks
        except ConfigError as error:
            raise _cannot_take(error) from error
        return read

    def _check(self, manifest: Manifest) -> None:
        read = self.weights()
        if read is self._read and manifest is self._checked and _are_same(_forms_of(self._sharded), self._forms):
            return
        self._checked = None
        own = {name: tensor for name, tensor in read.items() if name not in self._left}
        metas = (ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in own.items())
        aliases = {alias: name for alias, name in self._weights.aliases.items() if name in own}
        self.takers = manifest.require(metas, "the worker's model", aliases)
        self._whole, self._parts, self._twins, self._sharded = {}, {}, [], []
        for name, takers in self.takers.items():
            tensors = [read[taker] for taker in takers]
            if any(map(is_sharded, tensors)):
                self._parts[name] = _parts_of(takers, tensors)
                self._sharded += filter(is_sharded, tensors)
            else:
                self._whole[name] = tensors[0]
                self._twins += [(tensors[0], other) for other in tensors[1:]]
        self._forms = _forms_of(self._sharded)
        self._targets = None
        self._read, self._checked = read, manifest

    def dtypes(self) -> dict[str, str]:
        """Return the dtype's name of each weight of the model, under each of its names."""
        names = {name: dtype_name(tensor.dtype) for name, tensor in self._weights.read().items()}
        return names | {alias: names[name] for alias, name in self._weights.aliases.items()}

    def destinations(self) -> Mapping[str, Tensor]:
        return self._whole

    def __call__(self, weights: Weights) -> None:
        if self._parts:
            for name, tensor in weights:
                scatter(tensor, self._parts.get(name, ()))
            weights = [(name, tensor) for name, tensor in weights if name not in self._parts]
        if not weights:
            return
        names, tensors = zip(*weights, strict=True)
        targets = list(map(self._whole.__getitem__, names))
        written = list(map(operator.is_, targets, tensors))  # by the engine, in place
        if any(written):
            moving = list(map(operator.not_, written))
            targets, tensors = list(compress(targets, moving)), tuple(compress(tensors, moving))
        if targets:
            with torch.no_grad():
                if targets[0].is_cuda:
                    targets, tensors = list(map(as_bits, targets)), tuple(map(as_bits, tensors))
                torch._foreach_copy_(targets, tensors)

    def finish(self) -> None:
        """Copy what is one weight on the trainer, but two here."""
        with torch.no_grad():
            for source, target in self._twins:
                target.copy_(source)
        self._begun = None


def _forms_of(tensors: Sequence[Tensor]) -> list[Sequence[object]]:
    """Return columns of what changes if shards of this rank are placed otherwise, replaced, or moved."""
    shards = list(map(local_of, tensors))
    return [
        list(map(operator.attrgetter("_spec"), tensors)),
        shards,
        list(map(torch.Tensor.data_ptr, shards)),
        list(map(torch.Tensor.stride, shards)),
    ]


def _are_same(found: list[Sequence[object]], known: list[Sequence[object]]) -> bool:
    """Whether columns of objects and of values are the same."""
    objects, values = zip(found[:2], known[:2], strict=True), zip(found[2:], known[2:], strict=True)
    return all(all(map(operator.is_, new, old)) for new, old in objects) and all(new == old for new, old in values)


def _parts_of(names: Sequence[str], tensors: Sequence[Tensor]) -> list[Target]:
    try:
        return [target for name, tensor in zip(names, tensors, strict=True) for target in own_targets(name, tensor)]
    except ConfigError as error:
        raise _cannot_take(error) from error


def _cannot_take(error: ConfigError) -> ManifestMismatchError:
    return ManifestMismatchError(f"The worker's model cannot take weights. {error.message}", phase="update")


class CheckpointFormatLoader:
    """Hands checkpoint-format weights to a model's own loader, with a layerwise stage behind it.

    When the last parameter of a layer has arrived, ``process_weights_after_loading(layer)`` runs, so that quantising
    or repacking needs the extra memory of one layer and not of the model. A layer is what a numbered part of the
    parameter's name points to (``model.layers.3``), else the module that owns the parameter.

    Args:
        load_weights: any callable that takes ``[(name, tensor), ...]`` in checkpoint format, such as a vLLM model's
            ``load_weights``. It is called several times per update. Its method ``begin(manifest)``, if it has one, is
            called first, and may refuse the update.
        model: needed with ``process_weights_after_loading``.
        process_weights_after_loading: called once per layer and update with the layer's module. Partial updates must
            then hold whole layers.
    """

    _LAYER = re.compile(r"^(.*?\.\d+)\.")

    def __init__(
        self,
        load_weights: Callable[[Weights], object],
        model: nn.Module | None = None,
        process_weights_after_loading: Callable[[nn.Module], object] | None = None,
    ) -> None:
        if process_weights_after_loading is not None and model is None:
            raise ValueError("process_weights_after_loading needs the model whose layers it is to process")
        require_eager(load_weights, "load_weights")
        if process_weights_after_loading is not None:
            require_eager(process_weights_after_loading, "process_weights_after_loading")
        self._load_weights = load_weights
        self._model = model
        self._process = process_weights_after_loading
        self._missing: Counter[str] = Counter()
        self._sizes: Mapping[str, int] = {}
        self._whole: Mapping[str, int] = {}
        self._modules: dict[str, nn.Module] = {}

    def begin(self, manifest: Manifest) -> None:
        begin: Callable[[Manifest], object] | None = getattr(self._load_weights, "begin", None)
        if begin is not None:
            begin(manifest)
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
            lend(weights, self._load_weights)
            return
        part: Weights = []
        for name, tensor in weights:
            part.append((name, tensor))
            layer = self.layer_of(name)
            self._missing[layer] -= 1
            if not self._missing[layer]:
                lend(part, self._load_weights)
                part = []
                require_done(self._process(self._module(layer)), self._process, "process_weights_after_loading")
        if part:
            lend(part, self._load_weights)

    def finish(self) -> None:
        self._whole = self._sizes

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
    return {True: CheckpointFormatLoader(load, model, process_weights_after_loading), False: kernel}


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
