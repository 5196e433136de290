"""A loader of weights of which a user has declared what the worker keeps, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from weight_transfer.config.structuring import nearest
from weight_transfer.errors import ConfigError, ManifestMismatchError
from weight_transfer.model.abilities import offers
from weight_transfer.model.anchors import Anchors
from weight_transfer.model.checkpoint_loading import CheckpointFormatLoader
from weight_transfer.model.loading import (
    FRESH,
    ExpectantLoader,
    InPlaceLoader,
    KernelFormatLoader,
    ReadableLoader,
)
from weight_transfer.model.manifest import Manifest, ParamMeta, cast_hint, dtype_name
from weight_transfer.model.overlap import Memory, overlapping
from weight_transfer.model.shards import Target
from weight_transfer.model.state import is_dense, is_lazy, lack_of_memory, local_part
from weight_transfer.model.targets import NO_TARGETS, RegionLoader, scatter
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weight_transfer.model.loading import WeightLoader, Weights
    from weight_transfer.model.targets import Needs, Targets

T = TypeVar("T")


class DeclaredLoader:
    """Puts weights where a user has declared, and hands those without a target to another loader.

    Args:
        needs: see `WeightReceiver`.
        model: in whose memory most targets lie. A target may also lie elsewhere on one of the model's devices.
        rest: takes the weights that have no target.

    Raises:
        ConfigError: ``needs`` holds something else than targets; two share memory; one has no bytes of its own, or lies
            on another device than the model. The weight is named.
    """

    def __init__(self, needs: Needs, model: nn.Module, rest: WeightLoader) -> None:
        self._needs = needs
        self._model = model
        self._rest = rest
        self._manifest: Manifest | None = None
        self._begun: Manifest | None = None
        self._other = Manifest(())
        self._declared: Targets = {}
        self._targets: Targets = {}
        self._made_of: tuple[object, object] = (None, None)
        self._looks = 0
        self._seen = Deadline(0.0)
        if not callable(needs) and not isinstance(needs, Mapping):
            raise ConfigError(
                "needs: expected targets by name, such as {'layers.0.weight': Target(region, tensor)}, or a function "
                f"of the manifest that returns them, got {needs!r}."
            )
        self._anchors = self._anchored({} if callable(needs) else needs)

    @property
    def disturbs(self) -> bool:
        return self._rest.disturbs

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._rest.warnings

    def expect(self) -> None:
        self._seen = Deadline(0.0)
        seen = Deadline(FRESH)
        if self._manifest is not None and self._anchors.hold:
            self._seen = seen
        if offers(self._rest, ExpectantLoader):
            self._rest.expect()

    def begin(self, manifest: Manifest) -> None:
        self._begun = None
        self._hand_rest(manifest, self._rest.begin)
        self._begun = manifest

    def targets(self, manifest: Manifest) -> Targets:
        if offers(self._rest, RegionLoader):
            is_begun = self._begun is manifest
            rest = self._rest.targets(self._other) if is_begun else self._hand_rest(manifest, self._rest.targets)
        else:
            rest = NO_TARGETS
            self._resolve(manifest)
        if not (self._made_of[0] is self._declared and self._made_of[1] is rest):
            self._targets, self._made_of = {**rest, **self._declared}, (self._declared, rest)
        return self._targets

    def destinations(self) -> Mapping[str, Tensor] | None:
        return self._rest.destinations() if offers(self._rest, InPlaceLoader) else None

    def landed(self, manifest: Manifest) -> Targets:
        rest = self._rest.landed(self._other) if offers(self._rest, ReadableLoader) else NO_TARGETS
        return {**rest, **self._declared}

    def dtypes(self) -> Mapping[str, str] | None:
        """Return the dtypes of what is copied by name, and of the targets as far as they are known."""
        if not isinstance(self._rest, KernelFormatLoader):
            return None
        declared = {name: dtype_name(some[0].tensor.dtype) for name, some in self._anchors.targets.items() if some}
        return self._rest.dtypes() | declared

    def __call__(self, weights: Weights) -> None:
        rest = []
        for name, tensor in weights:
            if name in self._declared:
                scatter(tensor, self._declared[name])
            else:
                rest.append((name, tensor))
        if rest:
            self._rest(rest)

    def finish(self) -> None:
        self._begun = None
        self._rest.finish()

    def abort(self, reason: str, touched: bool) -> None:
        self._begun = None
        self._rest.abort(reason, touched)

    def _hand_rest(self, manifest: Manifest, take: Callable[[Manifest], T]) -> T:
        """Hand the part of the manifest without targets to the loader of the rest; return what that returns."""
        self._resolve(manifest)
        result = take(self._other)
        if isinstance(self._rest, KernelFormatLoader) and self._rest.looks != self._looks:
            self._manifest = None  # the model's weights have moved, and the targets may fill others of them
            self._resolve(manifest)
            result = take(self._other)
        return result

    def _resolve(self, manifest: Manifest) -> None:
        seen, self._seen = self._seen, Deadline(0.0)
        if manifest is self._manifest and (not seen.expired or self._anchors.hold):
            return
        self._manifest = None
        if callable(self._needs):
            self._anchors = self._anchored(self._needs(manifest))
        elif not self._anchors.hold:
            known, self._anchors = self._anchors, self._anchored(self._needs)
            lost = known.lost(self._anchors)
            if lost is not None:
                self._anchors = known
                raise ManifestMismatchError(
                    f"The target of {lost!r} lies where a weight of the worker's model lay before it was moved; give "
                    "needs as a function, which is called again after a move.",
                    phase="update",
                )
        targets = _fitted(manifest, self._anchors.targets)
        self._other = manifest.without(targets)
        if isinstance(self._rest, KernelFormatLoader):
            self._rest.leave(self._filled(self._rest.weights(), targets, manifest))
            self._looks = self._rest.looks
        elif isinstance(self._rest, CheckpointFormatLoader):
            self._rest.leave({owner for _, owner in self._anchors.owners if owner is not None})
        self._declared, self._manifest = targets, manifest

    def _anchored(self, needs: object) -> Anchors:
        anchors = Anchors(self._model, _structured(needs))
        own = [(name, target) for name, some in anchors.targets.items() for target in some]
        for name, target in own:
            _require_writable(name, target, anchors)
        shared = overlapping({str(number): target.tensor for number, (_, target) in enumerate(own)})
        if shared is not None:
            one, other = (f"{name} {target.region}" for name, target in map(own.__getitem__, map(int, shared)))
            what = "has several elements in one place" if shared[0] == shared[1] else f"shares memory with {other}"
            raise ConfigError(f"needs: the target of {one} {what}, so that one would overwrite the other.")
        return anchors

    def _filled(self, weights: Mapping[str, Tensor], targets: Targets, manifest: Manifest) -> frozenset[str]:
        """Return the names of the model's weights that the targets fill, so that none of them is to come by name."""
        memory = Memory({name: local_part(tensor) for name, tensor in weights.items()})
        sent_too = {*self._other.by_name, *self._other.aliases}
        filled = {
            name: 0 for name, tensor in weights.items() if not local_part(tensor).numel() and name not in sent_too
        }
        for sent, some in targets.items():
            for target in some:
                name = memory.owner(target.tensor)
                if name is None:
                    continue
                if name in sent_too:
                    raise ManifestMismatchError(
                        f"The target of {sent!r} lies in {name!r} of the worker's model, which is sent by its own "
                        "name, too; declare targets for both or for none.",
                        phase="update",
                    )
                filled[name] = filled.get(name, 0) + target.tensor.nbytes
        for name, nbytes in filled.items():
            whole = local_part(weights[name]).nbytes
            if nbytes != whole and not manifest.partial:
                raise ManifestMismatchError(
                    f"Targets are declared for {nbytes} of the {whole} bytes of {name!r} of the worker's model, and "
                    "nothing is sent for the others; declare all that it is made of.",
                    phase="update",
                )
        return frozenset(filled)


def declared_for(
    needs: Needs,
    model: nn.Module,
    loaders: Mapping[bool, WeightLoader],
    process_weights_after_loading: object = None,
) -> Mapping[bool, WeightLoader]:
    """Return loaders for checkpoint format (True) and kernel format (False) that put declared weights in their places.

    Args:
        needs: see `WeightReceiver`.
        model: see there.
        loaders: of the other weights, by format.
        process_weights_after_loading: see there; it is for the other weights only, so that there may be none.

    Raises:
        ConfigError: see `DeclaredLoader`.
    """
    if process_weights_after_loading is not None:
        raise ConfigError(
            "needs and process_weights_after_loading do not go together: a layer of which some weights are put in "
            "place by themselves is never complete in the loader. Declare nothing, or process the layers afterwards."
        )
    checkpoint = DeclaredLoader(needs, model, loaders[True])
    kernel = checkpoint if loaders[False] is loaders[True] else DeclaredLoader(needs, model, loaders[False])
    return {True: checkpoint, False: kernel}


def _structured(needs: object) -> dict[str, tuple[Target, ...]]:
    """Return targets by name, each in a tuple."""
    if not isinstance(needs, Mapping):
        raise ConfigError(f"needs: expected targets by name, got {needs!r}.")
    found: dict[str, tuple[Target, ...]] = {}
    for name, given in needs.items():
        some = (given,) if isinstance(given, Target) else given
        if (
            not isinstance(name, str)
            or not isinstance(some, Sequence)
            or not all(isinstance(target, Target) for target in some)
        ):
            raise ConfigError(f"needs: expected a Target or a list of them for {name!r}, got {given!r}.")
        found[name] = tuple(some)
    return found


def _require_writable(name: str, target: Target, anchors: Anchors) -> None:
    tensor, problem = target.tensor, ""
    if tensor.is_meta:
        problem = "lies on the meta device and has no bytes; materialise the model first"
    elif not is_dense(tensor) or tensor.is_quantized:
        problem = "is quantised, sharded or otherwise no plain tensor, whose bytes are not those of its shape"
    elif is_lazy(tensor):
        problem = "is a conjugate or negative view, whose bytes are not its values"
    elif tuple(tensor.shape) != target.region.shape:
        problem = f"has the shape {list(tensor.shape)} now; declare it anew"
    elif tensor.device not in anchors.devices:
        devices = " and ".join(sorted(map(str, anchors.devices)))
        problem = f"lies on {tensor.device}, and the model on {devices}; a worker's targets lie with its model"
    else:
        problem = lack_of_memory(tensor)
    if problem:
        raise ConfigError(f"needs: the target of {name!r} {problem}.")


def _fitted(manifest: Manifest, declared: Mapping[str, Sequence[Target]]) -> dict[str, tuple[Target, ...]]:
    """Return the targets of the manifest's weights, under the name by which each travels.

    Raises:
        ManifestMismatchError: one is not sent, is smaller than a region, or has another dtype; it is named.
    """
    targets: dict[str, tuple[Target, ...]] = {}
    for name, some in declared.items():
        param = manifest.by_name.get(manifest.aliases.get(name, name))
        if param is None:
            if manifest.partial:
                continue
            hint = nearest(name, tuple(manifest.by_name)) or "."
            raise ManifestMismatchError(
                f"needs declares a target of {name!r}, which the trainer does not send{hint}", phase="update"
            )
        for target in some:
            _require_fit(param, target)
        targets[param.name] = (*targets.get(param.name, ()), *some)
    return targets


def _require_fit(param: ParamMeta, target: Target) -> None:
    if not target.region.fits(param.shape):
        raise ManifestMismatchError(f"needs declares {target.region} of {param}, which lies beyond it.", phase="update")
    own = ParamMeta(param.name, dtype_name(target.tensor.dtype), param.shape)
    if own.dtype != param.dtype:
        raise ManifestMismatchError(
            f"The weights do not fit: {param} was sent, but its target on the worker has {own.dtype}."
            f"{cast_hint(param, own)}",
            phase="update",
        )
