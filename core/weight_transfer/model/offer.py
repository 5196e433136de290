"""What a loader that copies by a recording may write into the tensors that serve."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
from torch import Tensor

from weight_transfer.model.copies import Landing, has_form
from weight_transfer.model.load_plan import LoadPlan, spread
from weight_transfer.model.shards import Target
from weight_transfer.model.targets import Targets

if TYPE_CHECKING:
    from weight_transfer.model.manifest import Manifest


@attrs.frozen(eq=False)
class Offer:
    """What may be written directly.

    Attributes:
        forms: where the tensors lay that might be, and their shapes and strides.
        same: the layers of which it was known that processing does not change them.
        landings: of the layers that are written directly.
        fills: views of their tensors that are filled, and with what.
        targets: of their sources, and nothing of those that this worker does not keep.
        destinations: of the sources that go whole into one place.
    """

    forms: Sequence[object]
    same: frozenset[str]
    landings: Mapping[str, Landing]
    fills: Sequence[tuple[Tensor, bool | int | float]]
    targets: Targets
    destinations: Mapping[str, Tensor]

    @property
    def layers(self) -> Collection[str]:
        """The layers that are written directly."""
        return self.landings.keys()

    def holds(self, kernel: Mapping[str, Tensor], same: Collection[str]) -> bool:
        """Whether it still is what `of` returns."""
        return self.forms == _forms_of(kernel) and self.same == same

    def written(self, weights: Sequence[tuple[str, Tensor]]) -> frozenset[int]:
        """Return the numbers of those weights that an engine has written into their destinations already."""
        if not self.destinations:
            return frozenset()
        found = self.destinations.get
        return frozenset(number for number, (name, tensor) in enumerate(weights) if found(name) is tensor)

    @classmethod
    def of(
        cls,
        plan: LoadPlan,
        manifest: Manifest,
        kernel: Mapping[str, Tensor],
        same: Collection[str],
        layer_of: Callable[[str], str],
    ) -> Offer:
        """Find out what may be written directly.

        A layer is written in one way, by all of its sources, and only if its tensors look as those that were recorded:
        views of a contiguous tensor are none of one that is padded.

        Args:
            plan: what is recorded.
            manifest: of the weights.
            kernel: tensors of layers that might be written, by name.
            same: layers that processing does not change.
            layer_of: returns the layer to which a target belongs.
        """
        recorded = plan.recording.targets
        boxes = {name: plan.recording.boxes(name) for name in plan.copies}
        touched = {name: {move.layer for move in moves} for name, moves in plan.copies.items()}
        able = {layer_of(name) for name in kernel}.intersection(same, plan.into)
        others = dict.fromkeys(plan.into.keys() - able, "")
        for name, moves in plan.copies.items():
            found = (kernel.get(move.copy.target) for move in moves)
            fit = (
                tensor is not None and has_form(tensor, recorded[move.copy.target])
                for tensor, move in zip(found, moves, strict=True)
            )
            if boxes[name] is None or not all(fit):
                others |= dict.fromkeys(touched[name], "")
        for layer, filled in plan.fills.items():
            if not all(
                fill.target in kernel and has_form(kernel[fill.target], recorded[fill.target]) for fill in filled
            ):
                others[layer] = ""
        spread(others, touched)
        able -= others.keys()
        targets: dict[str, Sequence[Target]] = {}
        destinations: dict[str, Tensor] = {}
        for param in manifest.params:
            if param.name in plan.recording.unused:
                targets[param.name] = ()
            elif not able.isdisjoint(touched.get(param.name, ())):
                own = [Target(region, to.on(kernel[name])) for region, name, to in boxes[param.name] or ()]
                targets[param.name] = own
                if len(own) == 1 and own[0].region.shape == param.shape:
                    destinations[param.name] = own[0].tensor
        landings = {layer: Landing(plan.into[layer], kernel, recorded) for layer in able}
        fills = [
            (fill.to.on(kernel[fill.target].detach()), fill.value)
            for layer in able
            for fill in plan.fills.get(layer, ())
            if plan.into[layer] or not manifest.partial  # a part that has nothing of a layer leaves it as it is
        ]
        return cls(_forms_of(kernel), frozenset(same), landings, fills, targets, destinations)


def _forms_of(kernel: Mapping[str, Tensor]) -> list[object]:
    """Return columns of what changes if a tensor is replaced, moved or shaped otherwise."""
    tensors: Iterable[Tensor] = kernel.values()
    return [
        list(kernel),
        list(map(Tensor.data_ptr, tensors)),
        list(map(operator.attrgetter("shape"), tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(operator.attrgetter("dtype"), tensors)),
    ]
