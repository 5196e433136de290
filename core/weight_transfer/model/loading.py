"""What a worker does with weights that arrive: copy them in place, or hand them to the model's own loader."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from weight_transfer.copying.host import HostCopies, copy_on_host
from weight_transfer.errors import ConfigError, ManifestMismatchError, WeightsMovedError
from weight_transfer.model.abilities import offers
from weight_transfer.model.bits import as_bits
from weight_transfer.model.looking import Confidence, Look, Stages
from weight_transfer.model.manifest import ParamMeta, dtype_name
from weight_transfer.model.regions import Region
from weight_transfer.model.sharding import LocalParts
from weight_transfer.model.shards import Target
from weight_transfer.model.source import is_sharded
from weight_transfer.model.targets import own_targets, scatter
from weight_transfer.model.weights import ModuleWeights
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weight_transfer.memory.gpu_copies import WeightCopies
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets

Weights = list[tuple[str, "Tensor"]]


class WeightLoader(Protocol):
    """Takes weights part by part."""

    @property
    def disturbs(self) -> bool:
        """Whether nobody may use the model while this says what it keeps of it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is amiss with the last update though it is good, for reports, a sentence each: a slow path, say."""

    def begin(self, manifest: Manifest) -> None:
        """An update begins; changes nothing yet. Raise ``ManifestMismatchError`` if it cannot fit."""

    def __call__(self, weights: Weights) -> None:
        """Load these weights. The tensors are only valid during the call."""

    def finish(self) -> None:
        """Every parameter of the manifest has been loaded."""

    def abort(self, reason: str, touched: bool) -> None:
        """The update that began has failed, and nothing of it will come any more.

        Args:
            reason: a sentence.
            touched: whether some of it had come.
        """


@runtime_checkable
class InPlaceLoader(Protocol):
    """A loader that only copies, and can therefore say where to."""

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return the worker's own tensors by name, each of the shape and dtype of the manifest that began.

        Of weights that it keeps in parts there is none; None if it keeps none whole. It is the same object only as long
        as each of them is the same one, and lies where and as it lay.
        """


@runtime_checkable
class ExpectantLoader(Protocol):
    """A loader that can do a part of what `WeightLoader.begin` does in advance."""

    def expect(self) -> None:
        """Look whether the model is as it was when the last update began; ``begin`` counts on it for `FRESH` seconds.

        Changes nothing, and may run while somebody samples.
        """


@runtime_checkable
class VouchingLoader(Protocol):
    """A loader that can look at one weight after the other, while bytes come, instead of at all of them first."""

    def begin_in_stages(self, manifest: Manifest) -> None:
        """Do what `WeightLoader.begin` does, and leave it to `vouch` to look whether the model is as it was."""

    def vouch(self, names: Iterable[str] | None = None) -> None:
        """See that weights of the worker's are still the ones, and lie where they lay, before they are written.

        Args:
            names: which, of the manifest that began; None for all. After `WeightLoader.begin` all have been seen.

        Raises:
            WeightsMovedError: they are not, or others.
        """


FRESH = 0.1
"""Seconds for which a look at a model counts: an update that is expected begins within some milliseconds."""


@runtime_checkable
class ReadableLoader(Protocol):
    """A loader after which the bytes of weights can be read where they were loaded."""

    def landed(self, manifest: Manifest) -> Targets:
        """Return where the bytes of weights lie after `finish`, by name, of the manifest that began.

        Those of a weight that is not among them cannot be read: they were loaded in another form. Two targets of the
        same region of a weight hold the same bytes.
        """


@runtime_checkable
class InPlaceTarget(Protocol):
    """What a receiver's ``load_weights`` offers beside being called; see `destinations_of`."""

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return the worker's own tensors by name, if the loader only copies.

        The same object from update to update as long as none of them was replaced, moved or laid out anew.
        """

    def write_in_place(self, names: Iterable[str] | None = None) -> None:
        """Say that bytes are about to be written there; raises after the deadline or an abort.

        Args:
            names: into which of these tensors; None for any of them. It sees that they are still the worker's own: of
                thousands, those that it has not seen yet, while the bytes of others arrive.

        Raises:
            WeightsMovedError: one of them, or of the others, was replaced or moved since the update began.
        """

    def written(self, nbytes: int, names: Iterable[str] = ()) -> None:
        """Say that so many bytes have been written there, instead of handing over the tensors they belong to.

        Args:
            nbytes: their number.
            names: weights that are whole now, if the engine tells; then digests are taken while others arrive.
        """

    def copy(self, copies: HostCopies | WeightCopies, names: Sequence[str]) -> None:
        """Run copies between `write_in_place` and `written`, and take digests, if they are wanted, as the bytes pass.

        Args:
            copies: into these tensors; those on a GPU are queued on its current stream.
            names: of their targets, whole weights.
        """


def destinations_of(load_weights: Callable[[Weights], object]) -> Mapping[str, Tensor] | None:
    """Return where an engine may write the weights directly, by name; None if it may not.

    Before each batch of writes the engine calls ``load_weights.write_in_place()``, best with the names of the weights;
    afterwards it hands the written tensors themselves to ``load_weights``, or says ``load_weights.written(nbytes)``,
    which for thousands of them takes less time. What was worked out of the tensors' addresses holds as long as the
    mapping is the same object. A plain callable, such as a model's ``load_weights``, gives None.
    """
    return load_weights.destinations() if offers(load_weights, InPlaceTarget) else None


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
        self._twins: dict[str, list[Tensor]] = {}
        self._targets: Targets | None = None
        self._shards = LocalParts(())
        self._left: Collection[str] = ()
        self._checked: Manifest | None = None
        self._begun: Manifest | None = None
        self._looks = 0
        self._seen = Deadline(0.0)
        self._confidence = Confidence()
        self._stages = Stages({})
        self._model_stages: Mapping[str, int] = {}
        self._look: Look | None = None
        self.takers: Mapping[str, tuple[str, ...]] = {}
        """Names in the model by names in the manifest: several for weights that are tied on the trainer alone."""

    disturbs = False

    @property
    def warnings(self) -> tuple[str, ...]:
        return ()

    @property
    def looks(self) -> int:
        """How often the model was looked at anew: whenever a weight was moved, among other reasons."""
        return self._weights.looks

    def expect(self) -> None:
        self._seen = Deadline(0.0)
        seen = Deadline(FRESH)
        if self._checked is not None and self._weights.are_unchanged and self._shards.unchanged:
            self._seen = seen

    def begin(self, manifest: Manifest) -> None:
        self._begun = self._look = None
        if self._seen.expired or not self._knows(manifest):
            self._check(manifest)
        self._seen = Deadline(0.0)
        self._begun = manifest

    def begin_in_stages(self, manifest: Manifest) -> None:
        look = self._begun_look(manifest)
        if look is None:
            self.begin(manifest)
            return
        self._begun, self._look = manifest, look

    def vouch(self, names: Iterable[str] | None = None) -> None:
        look = self._look
        if look is None:
            return
        if not (look.finish() if names is None else look.reach(self._stages.of(names))):
            self._look = None
            self._confidence.learn(unchanged=False, was_surprised=True)
            raise WeightsMovedError("Weights of the worker's model were replaced or moved meanwhile.", phase="update")
        if look.is_over:
            self._look = None
            self._confidence.learn(unchanged=True)

    def _begun_look(self, manifest: Manifest) -> Look | None:
        """Return a look at the model that has begun well; None if all of it has to be looked at first, or was."""
        if not (self._seen.expired and self._knows(manifest) and self._confidence.suffices):
            return None
        if self._parts or not self._weights.can_be_recalled:
            return None
        if self._weights.stages is not self._model_stages:
            self._number_stages()
        look = self._weights.look()
        return look if look.go_on() else None

    def _knows(self, manifest: Manifest) -> bool:
        """Whether this was checked, and against what the model's reader has read last, of which its looks speak."""
        return manifest is self._checked and self._weights.known is self._read

    def _number_stages(self) -> None:
        self._model_stages = stages = self._weights.stages
        self._stages = Stages({name: max(map(stages.__getitem__, own)) for name, own in self.takers.items()})

    def targets(self, manifest: Manifest) -> Targets:
        if self._begun is not manifest:
            self._check(manifest)
        if self._targets is None:
            whole = {name: [_whole_target(tensor)] for name, tensor in self._whole.items()}
            self._targets = whole | self._parts
        return self._targets

    def landed(self, manifest: Manifest) -> Targets:
        twins = {name: [_whole_target(twin) for twin in twins] for name, twins in self._twins.items()}
        return {name: [*some, *twins.get(name, ())] for name, some in self.targets(manifest).items()}

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
        is_known = read is self._read and manifest is self._checked and self._shards.unchanged
        self._confidence.learn(is_known)
        if is_known:
            return
        self._checked = None
        own = {name: tensor for name, tensor in read.items() if name not in self._left}
        metas = (ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in own.items())
        aliases = {alias: name for alias, name in self._weights.aliases.items() if name in own}
        self.takers = manifest.require(metas, "the worker's model", aliases)
        self._whole, self._parts, self._twins = {}, {}, {}
        sharded: list[Tensor] = []
        for name, takers in self.takers.items():
            tensors = [read[taker] for taker in takers]
            if any(map(is_sharded, tensors)):
                self._parts[name] = _parts_of(takers, tensors)
                sharded += filter(is_sharded, tensors)
            else:
                self._whole[name], *twins = tensors
                if twins:
                    self._twins[name] = twins
        self._shards = LocalParts(sharded)
        self._targets = None
        self._number_stages()
        self._read, self._checked = read, manifest

    def dtypes(self) -> dict[str, str]:
        """Return the dtype's name of each weight of the model, under each of its names."""
        names = {name: dtype_name(tensor.dtype) for name, tensor in self._weights.read().items()}
        return names | {alias: names[name] for alias, name in self._weights.aliases.items()}

    def destinations(self) -> Mapping[str, Tensor]:
        return self._whole

    def __call__(self, weights: Weights) -> None:
        self.vouch(name for name, _ in weights)
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
                    torch._foreach_copy_(list(map(as_bits, targets)), tuple(map(as_bits, tensors)))
                else:
                    copy_on_host(targets, tensors)

    def finish(self) -> None:
        """Copy what is one weight on the trainer, but two here."""
        self.vouch()
        if self._twins:
            self._copy_twins()
        self._begun = None

    @torch.no_grad()
    def _copy_twins(self) -> None:
        for name, twins in self._twins.items():
            for twin in twins:
                twin.copy_(self._whole[name])

    def abort(self, reason: str, touched: bool) -> None:
        """Nothing to put back: what was copied stays, and is no whole version."""
        self._begun = self._look = None


def _whole_target(tensor: Tensor) -> Target:
    return Target(Region.whole(tensor.shape), tensor)


def _parts_of(names: Sequence[str], tensors: Sequence[Tensor]) -> list[Target]:
    try:
        return [target for name, tensor in zip(names, tensors, strict=True) for target in own_targets(name, tensor)]
    except ConfigError as error:
        raise _cannot_take(error) from error


def _cannot_take(error: ConfigError) -> ManifestMismatchError:
    return ManifestMismatchError(f"The worker's model cannot take weights. {error.message}", phase="update")
