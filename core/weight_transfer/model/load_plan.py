"""What a recording makes of a model's layers: which weights go straight into which, and what is left to its loader."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.copies import Move
from weight_transfer.model.delivery import Delivery
from weight_transfer.model.manifest import torch_dtype
from weight_transfer.model.recording import FAILS, RecordedFill, Recording

if TYPE_CHECKING:
    from weight_transfer.model.manifest import Manifest

_DELIVERIES = 2**14  # that are remembered; each may be one weight
_MANY = 3  # names that an error or a warning lists


@attrs.frozen(eq=False)
class LoadPlan:
    """A recording, sorted by source and by layer.

    Attributes:
        recording: the recording.
        copies: by source, those into layers that are planned.
        into: the same by planned layer, which is complete when all of them are made.
        fills: by planned layer.
        by_loader: sources that the model's own loader takes.
        unplanned: reasons by layer, of those that the model's own loader takes.
        told: those of them for which something is sent.
        is_whole: False if nothing is planned, since of some weights nobody can say where they go.
    """

    recording: Recording
    copies: Mapping[str, list[Move]]
    into: Mapping[str, list[Move]]
    fills: Mapping[str, list[RecordedFill]]
    by_loader: frozenset[str]
    unplanned: Mapping[str, str]
    told: Mapping[str, str]
    is_whole: bool
    _deliveries: dict[tuple[str, ...], Delivery] = attrs.field(factory=dict, init=False)

    def delivery(self, names: tuple[str, ...]) -> Delivery:
        """Return what becomes of weights that come together; the same object for the same names."""
        found = self._deliveries.get(names)
        if found is None:
            if len(self._deliveries) >= _DELIVERIES:  # they come in other groups each time
                self._deliveries.clear()
            found = self._deliveries[names] = Delivery.of(names, self.copies, self.by_loader)
        return found

    @classmethod
    def of(
        cls, recording: Recording, layer_of: Callable[[str], str], left: Mapping[str, str] | None = None
    ) -> LoadPlan:
        """Sort a recording. A layer is planned whole or not at all, and so is each source.

        If the loader failed at a source, or writes to a target from nobody knows where, nothing is planned: it might
        write into any layer.

        Args:
            recording: of the weights of an update.
            layer_of: returns the layer to which a target belongs.
            left: layers that are left to the model's own loader in any case, and why.
        """
        touched: dict[str, set[str]] = defaultdict(set)  # layers by source
        for copy in recording.copies:
            touched[copy.source].add(layer_of(copy.target))
        unplanned = dict(left or {})
        unplanned |= {layer_of(target): refusal.reason for target, refusal in recording.refused.items()}
        for target, refusal in recording.refused.items():
            for source in refusal.sources:
                touched[source].add(layer_of(target))
        unclear = [*recording.failed.values()]
        unclear += [refusal.reason for refusal in recording.refused.values() if not refusal.sources]
        if unclear:
            unplanned |= {layer_of(target): unclear[0] for target in recording.targets}
        spread(unplanned, touched)
        by_loader = {source for source, layers in touched.items() if not unplanned.keys().isdisjoint(layers)}
        params = recording.manifest.by_name
        copies: dict[str, list[Move]] = defaultdict(list)
        into: dict[str, list[Move]] = defaultdict(list)
        for copy in recording.copies:
            layer = layer_of(copy.target)
            if layer not in unplanned:
                param = params[copy.source]
                size = torch_dtype(param.dtype).itemsize
                move = Move.of(copy, layer, len(into[layer]), param.shape, recording.targets[copy.target], size)
                copies[copy.source].append(move)
                into[layer].append(move)
        fills: dict[str, list[RecordedFill]] = defaultdict(list)
        for fill in recording.fills:
            layer = layer_of(fill.target)
            if layer not in unplanned:
                fills[layer].append(fill)
                into.setdefault(layer, [])
        reached = set[str]().union(*touched.values())
        told = {layer: reason for layer, reason in unplanned.items() if unclear or layer in reached}
        if unclear:
            by_loader |= params.keys()
        return cls(recording, copies, into, fills, frozenset(by_loader), unplanned, told, not unclear)

    def require(
        self,
        manifest: Manifest,
        required: Collection[str],
        optional: Collection[str],
        layer_of: Callable[[str], str],
        directly: Collection[str] = (),
        split: tuple[int, int] = (0, 1),
    ) -> None:
        """Refuse weights that do not fit the model, or leave something of it as it is.

        Of what is not planned whole only that can be told at which the loader fails.

        Args:
            manifest: the weights.
            required: targets that have to be written.
            optional: targets that need not be written though their layer is loaded.
            layer_of: see `of`.
            directly: layers that are not processed, of which a partial update may hold a part.
            split: this rank, and how many there are that share a weight.

        Raises:
            ManifestMismatchError: a weight does not fit, or a target gets nothing or a part only; it is named.
        """
        for source, reason in self.recording.failed.items():
            if reason.startswith(FAILS):
                raise ManifestMismatchError(
                    f"The worker's model cannot load {manifest.by_name[source]}; send weights of its architecture and "
                    "size.",
                    phase="update",
                    cause=reason.removeprefix(FAILS),
                )
        self._require_no_rest(manifest, split)
        if not self.is_whole:
            return
        loaded = {layer for layer, moves in self.into.items() if moves} | self.told.keys()
        processed = loaded.difference(directly)
        lacking = {
            target: found
            for target, found in self.recording.uncovered.items()
            if (target in required and not manifest.partial)
            or (target not in optional and layer_of(target) in processed)  # it begins with memory that holds anything
        }
        self._require_nothing_lacking(lacking)

    def _require_no_rest(self, manifest: Manifest, split: tuple[int, int]) -> None:
        """Refuse a weight that is larger than what all ranks together keep of it: loaders cut without a word.

        Ranks cut alike: rank 3 of 4 begins at three shares, or, where several ranks have one share, keeps it whole.
        """
        rank, ranks = split
        for param in manifest.params:
            for (start, count), size in zip(self.recording.extents(param.name) or (), param.shape, strict=False):
                share = max(count, start // rank if rank else 0)
                if share * ranks < size:
                    raise ManifestMismatchError(
                        f"The worker's model has place for {share * ranks} of the {size} indices of a dimension of "
                        f"{param}; send weights of its size.",
                        phase="update",
                    )

    def _require_nothing_lacking(self, lacking: Mapping[str, tuple[int, int]]) -> None:
        missing = [target for target, (written, _) in lacking.items() if not written]
        partly = [target for target, (written, _) in lacking.items() if written]
        if partly:
            written, whole = lacking[partly[0]]
            raise ManifestMismatchError(
                f"{written} of the {whole} elements of {partly[0]!r} of the worker's model are sent, and nothing for "
                f"the others ({len(partly)} such parameters in all); send all that it is made of.",
                phase="update",
            )
        if missing:
            raise ManifestMismatchError(
                f"Nothing is sent for {listed(missing)} of the worker's model ({len(missing)} parameters in all); "
                "send what they are made of, or name them in ignore.",
                phase="update",
            )


def listed(names: Collection[str]) -> str:
    """Return the first few of some names, in quotes."""
    some = ", ".join(map(repr, sorted(names)[:_MANY]))
    return some if len(names) <= _MANY else f"{some} ..."


def spread(layers: dict[str, str], touched: Mapping[str, Iterable[str]]) -> None:
    """Add to some layers all those that share a source with one of them, until nothing does.

    Args:
        layers: with the reason of each.
        touched: layers by source.
    """
    by_layer: dict[str, list[str]] = defaultdict(list)
    for source, own in touched.items():
        for layer in own:
            by_layer[layer].append(source)
    todo = list(layers)
    while todo:
        layer = todo.pop()
        for source in by_layer[layer]:
            for other in touched[source]:
                if other not in layers:
                    layers[other] = f"it shares {source!r} with {layer}"
                    todo.append(other)
