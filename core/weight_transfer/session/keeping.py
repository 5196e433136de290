"""What a worker keeps of a model's weights, and what comes from where: worked out anew only if something changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.memory.integrity import Reading
from weight_transfer.model.abilities import offers
from weight_transfer.model.declared import DeclaredLoader
from weight_transfer.model.loading import KernelFormatLoader
from weight_transfer.model.targets import RegionLoader, tensors_of
from weight_transfer.plan.layout import NONE, Layout, Place, Regions, itemsizes
from weight_transfer.plan.pieces import Pieces, plan_pieces
from weight_transfer.plan.views import targets_of

if TYPE_CHECKING:
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.model.loading import WeightLoader
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


@attrs.frozen(eq=False, slots=False)
class Arrivals:
    """What a worker receives by region.

    Attributes:
        layout: which trainer ranks hold what.
        pieces: what comes from where into which target.
        targets: the tensors of all targets, in the manifest's order.
        planned: bytes by trainer rank.
    """

    layout: Layout
    pieces: Pieces
    targets: Sequence[torch.Tensor]
    planned: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(self.planned)

    @cached_property
    def views(self) -> list[torch.Tensor]:
        """The part of its target that each piece fills."""
        return targets_of(self.pieces, self.targets)

    @cached_property
    def reading(self) -> Reading:
        """What digests these."""
        return Reading(self.views)


class Keeping:
    """Of one loader, what it keeps.

    Args:
        worker: this worker's number among all.
        place: where its targets lie.
    """

    def __init__(self, worker: int, place: Place) -> None:
        self._worker = worker
        self._place = place
        self._manifest: Manifest | None = None
        self._targets: Targets | None = None
        self._kept: Regions | None = None
        self._plan: _Plan | None = None
        self._arrivals: Arrivals | None = None
        self._said: tuple[Manifest, Regions | None] | None = None

    def say(self, manifest: Manifest, loader: WeightLoader) -> Regions | None:
        """Return what `regions` does, to the trainer, which goes by it until it asks again."""
        kept = self.regions(manifest, loader)
        self._said = manifest, kept
        return kept

    def asks_again(self, manifest: Manifest, loader: WeightLoader) -> bool:
        """Return whether the loader keeps something else by now, after an update, than the trainer was told, if it was.

        It costs a look at the mapping that the loader returns; of one that only copies not even that, since what it
        keeps is in the model, and no update changes it.
        """
        if _only_copies(loader):
            return False
        told = self._said[1] if self._said is not None and self._said[0] is manifest else None
        try:
            return self.regions(manifest, loader) is not told
        except ManifestMismatchError:  # the trainer will hear of it when it asks, before the next update's first byte
            return True

    def regions(self, manifest: Manifest, loader: WeightLoader) -> Regions | None:
        """Return what the loader keeps of the weights; the same object while it says the same. None if it cannot tell.

        Raises:
            ManifestMismatchError: the weights do not fit.
        """
        targets = loader.targets(manifest) if offers(loader, RegionLoader) else {}
        if not targets:
            return None
        if targets is not self._targets or manifest is not self._manifest:
            regions = {name: [target.region for target in some] for name, some in targets.items()}
            kept = Regions.of(manifest, regions, self._place)
            is_known = self._kept is not None and manifest is self._manifest and kept.digest == self._kept.digest
            self._kept = self._kept if is_known else kept
            self._targets, self._manifest = targets, manifest
            self._arrivals = None
        return self._kept

    def arrivals(self, info: WeightTransferUpdateInfo, loader: WeightLoader) -> Arrivals | None:
        """Return what comes by region in an update; None if all goes whole.

        The same object while the layout, the manifest and the targets are the same ones; its pieces also, if targets
        were replaced by others of the same regions.

        Raises:
            ManifestMismatchError: the trainer's plan does not fit what this worker keeps; nothing was changed.
        """
        if info.layout is None:
            return None
        kept = self.regions(info.manifest, loader)
        known = info.kept[self._worker] if info.kept and self._worker < len(info.kept) else None
        if kept is None or kept.digest != known:
            raise ManifestMismatchError(
                "What this worker keeps of the weights has changed since it was asked; send again.", phase="update"
            )
        if self._plan is None or not self._plan.is_of(info.layout, kept):
            layout = Layout.from_wire(info.layout, info.manifest)
            pieces = plan_pieces(layout, kept, self._worker)
            _require_all(pieces, layout, kept)
            self._plan = _Plan(info.layout, kept, layout, pieces)
            self._arrivals = None
        if self._arrivals is None:
            assert self._targets is not None
            layout, pieces = self._plan.layout, self._plan.pieces
            ordered = {param.name: self._targets.get(param.name, ()) for param in info.manifest.params}
            planned = tuple(pieces.by_rank(len(layout.places)).tolist())
            self._arrivals = Arrivals(layout, pieces, tensors_of(ordered), planned)
        return self._arrivals


def _only_copies(loader: WeightLoader) -> bool:
    declared = isinstance(loader, DeclaredLoader) and loader.destinations() is not None
    return declared or isinstance(loader, KernelFormatLoader)


@attrs.frozen(eq=False)
class _Plan:
    """Pieces, and of what they were made."""

    wire: dict[str, Any]
    kept: Regions
    layout: Layout
    pieces: Pieces

    def is_of(self, wire: dict[str, Any], kept: Regions) -> bool:
        return self.wire is wire and self.kept is kept


def _require_all(pieces: Pieces, layout: Layout, kept: Regions) -> None:
    """Refuse a plan that leaves something of a target as it is.

    Raises:
        ManifestMismatchError: the first weight is named.
    """
    params = layout.manifest.params
    by_region = layout.pattern_of != NONE
    without = np.flatnonzero(by_region & (kept.pattern_of == NONE))
    if len(without):
        raise ManifestMismatchError(
            f"{params[without[0]].name!r} is to come by region, but this worker takes it whole; send again.",
            phase="update",
        )
    volumes = [[math.prod(row[len(row) // 2 :]) for row in rows] for rows in kept.patterns]
    sizes = [volume for pattern in kept.pattern_of.tolist() if pattern != NONE for volume in volumes[pattern]]
    param_of = np.repeat(np.arange(len(params)), kept.counts)
    expected = np.array(sizes, dtype=np.int64) * itemsizes(layout.manifest)[param_of] * by_region[param_of]
    planned = np.zeros(len(expected), dtype=np.int64)
    np.add.at(planned, pieces.target, pieces.sizes)
    unlike = np.flatnonzero(planned != expected)
    if len(unlike):
        first = int(unlike[0])
        raise ManifestMismatchError(
            f"{planned[first]} of {expected[first]} bytes that this worker keeps of {params[param_of[first]]} are to "
            "come by region.",
            phase="update",
        )
