"""A loader that copies by a recording, layer by layer, instead of running the model's own loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from weight_transfer.model.copies import Landing, Sources
from weight_transfer.model.load_plan import LoadPlan, listed
from weight_transfer.model.offer import Offer
from weight_transfer.model.recorder import record

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.model.loading import Weights
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


_PLANS = 4
"""Recordings that are kept: of all weights, and of the parts that are sent in turn."""


class ServedLayers(Protocol):
    """A server's model, as `PlannedLoader` drives it.

    Its weights have two forms: in *load format* they are as its own loader takes them, in kernel format as the kernels
    read them. A layer is loaded in the one, processed, and put back in the other. Names are those of the model's
    parameters and buffers.
    """

    def recorded(self) -> AbstractContextManager[tuple[Callable[[Weights], object], Mapping[str, Tensor]]]:
        """Put the model into load format without memory, for the length of a block, and leave it as it was.

        Nobody uses the model meanwhile: the receiver keeps samplers in ``serving()`` away, the server all others. What
        the loader does on threads of its own is not seen.

        Returns:
            The model's own loader, and all that it may write to: by name, on ``meta``.
        """

    def layer_of(self, name: str) -> str:
        """Return the layer that a weight belongs to: what is loaded and processed together."""

    def required(self) -> Collection[str]:
        """Return the names of the weights that an update has to write."""

    def optional(self) -> Collection[str]:
        """Return the names of the weights that need not be written though their layer is loaded."""

    def split(self) -> tuple[int, int]:
        """Return this rank and how many there are, of those among which each weight is cut in equal shares."""

    def state(self) -> object:
        """Return what the loader goes by beside the weights' names, such as which experts are here.

        If it compares unequal to what it was, the loader is recorded anew.
        """

    def by_loader(self) -> Mapping[str, str]:
        """Return the layers that are left to the model's own loader in any case, and why."""

    def in_place(self) -> Mapping[str, Tensor]:
        """Return the weights of the layers in whose kernel format one may write as in load format, as far as is known.

        Of those that this names, one is written into only after `end_layer` has said so, too.
        """

    def open(self, directly: Collection[str]) -> None:
        """The first bytes have come: layers are loaded from now on, except those that are written directly."""

    def begin_layer(self, layer: str) -> Mapping[str, Tensor]:
        """Return the layer's weights in load format, with memory, by name."""

    def end_layer(self, layer: str) -> bool:
        """All has been copied: process the layer, and put it into kernel format.

        Returns:
            Whether it holds there bit for bit what it held in load format.
        """

    def load(self, weights: Weights) -> None:
        """Have the model's own loader take weights of layers that are not planned. They are valid during the call."""

    def finish(self) -> None:
        """All layers have ended. Called only after `open`.

        Raises:
            ManifestMismatchError: of a layer that the model's own loader takes some weights came, and others did not.
        """

    def restore(self, reason: str) -> None:
        """The update has failed: leave nothing half done. Called only after `open`."""


class PlannedLoader:
    """Give it to a `WeightReceiver` as ``load_weights``.

    The model's own loader runs once, over weights without bytes, see `record`. From then on an update is copies, as
    many as possible at a time. A layer of which something could not be recorded is left to the model's loader, whole.

    Layers in whose kernel format one may write are written directly from the second update on, if the first one has
    shown that processing changes none of their bits; and workers then get only the regions that they keep.

    Args:
        layers: the model.
    """

    disturbs = True

    def __init__(self, layers: ServedLayers) -> None:
        self._layers = layers
        self._manifest: Manifest | None = None
        self._plan: LoadPlan | None = None
        self._plans: dict[str, LoadPlan] = {}  # by digest of the manifest, the latest last
        self._state: object = None
        self._same: set[str] = set()  # layers that processing does not change
        self._offer: Offer | None = None
        self._opened = False
        self._complete = False  # whether the plan is known to leave nothing as it is
        self._counts: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._landings: dict[str, Landing] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why some layers are left to the model's own loader, for reports."""
        told = self._plan.told if self._plan is not None else {}
        if not told:
            return ()
        return (
            f"{len(told)} layers are loaded by the model's own loader, which is slower: {listed(told)}, since "
            f"{told[min(told)]}.",
        )

    @property
    def unused(self) -> frozenset[str]:
        """The weights of the latest update of which this rank keeps nothing; the same object while that is planned."""
        return self._plan.recording.unused if self._plan is not None else frozenset()

    def begin(self, manifest: Manifest) -> None:
        """Record what is not recorded yet.

        Raises:
            ManifestMismatchError: the weights do not fit, or leave something of the model as it is.
        """
        plan, offer = self._plan_of(manifest), self._offered(manifest)
        if manifest.partial or not self._complete:
            layers = self._layers
            required, optional = layers.required(), layers.optional()
            plan.require(manifest, required, optional, layers.layer_of, offer.layers, layers.split())
            self._complete = not manifest.partial
        self._opened = False
        self._left, self._landings = dict(self._counts), dict(offer.landings)

    def __call__(self, weights: Weights) -> None:
        plan, offer = self._plan, self._offer
        assert plan is not None and offer is not None
        delivery = plan.delivery(tuple(name for name, _ in weights))
        sources, written = Sources([tensor for _, tensor in weights]), offer.written(weights)
        for step in delivery.steps:
            own = step.without(written)  # the engine has written these in place
            if not own.counts:
                continue
            for layer in own.counts:
                if layer not in self._landings:
                    self._begin(layer)
            own.make(self._landings, sources)
            for layer, count in own.counts.items():
                self._left[layer] -= count
                if not self._left[layer] and layer not in offer.landings:
                    self._end(layer)
        if delivery.others:
            self._open()
            self._layers.load([weights[number] for number in delivery.others])

    def finish(self) -> None:
        plan, offer = self._plan, self._offer
        assert plan is not None and offer is not None
        for layer, moves in plan.into.items():
            if not moves and layer not in offer.landings and self._manifest is not None and not self._manifest.partial:
                self._begin(layer)
                self._end(layer)
        for view, value in offer.fills:
            view.fill_(value)
        if self._opened:
            self._layers.finish()
        self._opened = False
        self._landings = {}

    def abort(self, reason: str, touched: bool) -> None:
        """Have the model restored. Layers that had ended hold the new weights, and those written directly a mixture."""
        opened, self._opened, self._landings = self._opened, False, {}
        if opened:
            self._layers.restore(reason)

    def targets(self, manifest: Manifest) -> Targets:
        self._plan_of(manifest)
        return self._offered(manifest).targets

    def destinations(self) -> Mapping[str, Tensor] | None:
        return self._offer.destinations if self._offer is not None and self._offer.destinations else None

    def _plan_of(self, manifest: Manifest) -> LoadPlan:
        known, state = self._manifest, self._layers.state()
        if state != self._state:
            self._plans, self._plan, self._state = {}, None, state
        if self._plan is None or known is None or (manifest is not known and manifest.digest != known.digest):
            self._plan = self._plans.pop(manifest.digest, None) or self._recorded(manifest)
            self._plans[manifest.digest] = self._plan
            while len(self._plans) > _PLANS:
                del self._plans[next(iter(self._plans))]
            self._counts = {layer: len(moves) for layer, moves in self._plan.into.items()}
            self._offer, self._complete = None, False
        self._manifest = manifest
        return self._plan

    def _recorded(self, manifest: Manifest) -> LoadPlan:
        with self._layers.recorded() as (load_weights, targets):
            recording = record(load_weights, manifest, targets)
        return LoadPlan.of(recording, self._layers.layer_of, self._layers.by_loader())

    def _offered(self, manifest: Manifest) -> Offer:
        """Return what may be written directly now; the same object while nothing changed."""
        assert self._plan is not None
        kernel, offer = self._layers.in_place(), self._offer
        if offer is None or not offer.holds(kernel, self._same):
            self._offer = offer = Offer.of(self._plan, manifest, kernel, self._same, self._layers.layer_of)
        return offer

    def _begin(self, layer: str) -> None:
        plan = self._plan
        assert plan is not None
        self._open()
        tensors = self._layers.begin_layer(layer)
        self._landings[layer] = Landing(plan.into[layer], tensors, plan.recording.targets)
        for fill in plan.fills.get(layer, ()):
            fill.to.on(tensors[fill.target]).fill_(fill.value)

    def _open(self) -> None:
        if not self._opened:
            assert self._offer is not None
            self._opened = True
            self._layers.open(self._offer.layers)

    def _end(self, layer: str) -> None:
        del self._landings[layer]
        if self._layers.end_layer(layer):
            self._same.add(layer)
        else:
            self._same.discard(layer)
