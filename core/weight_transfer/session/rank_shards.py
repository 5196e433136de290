"""What this trainer rank holds, as the ranks tell each other, with the tensors behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weight_transfer.plan.layout import NONE, Regions
from weight_transfer.session.guarded import GuardedSource

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.shards import Shard
    from weight_transfer.model.source import WeightSource
    from weight_transfer.plan.layout import Layout, Place


class RankShards:
    """The shards of one rank, read again at each update.

    Args:
        rank: this one. What every rank has in common counts on rank 0 alone.
        place: where its memory lies.
    """

    def __init__(self, rank: int, place: Place) -> None:
        self.rank = rank
        self.place = place
        self._shards: Mapping[str, Sequence[Shard]] | None = None
        self._manifest: Manifest | None = None
        self._regions: Regions | None = None
        self._own: dict[str, list[Shard]] = {}
        self._layout: Layout | None = None
        self._tensors: list[Tensor] = []

    def read(self, source: WeightSource, manifest: Manifest) -> Regions:
        """Return what this rank holds of the weights of a manifest; the same object while that is unchanged.

        Raises:
            ManifestMismatchError: a shard does not fit its weight; it is named.
        """
        shards = source.shards()
        if shards is not self._shards or manifest is not self._manifest or self._regions is None:
            fitting = GuardedSource(source, manifest).shards()
            self._own = {
                name: [shard for shard in some if not shard.common or self.rank == 0] for name, some in fitting.items()
            }
            held = {name: [shard.region for shard in some] for name, some in self._own.items()}
            regions = Regions.of(manifest, held, self.place)
            same = self._regions is not None and self._manifest is manifest and regions.digest == self._regions.digest
            if not same:
                self._regions = regions
            self._shards, self._manifest, self._layout = shards, manifest, None
        assert self._regions is not None
        return self._regions

    def tensors(self, layout: Layout) -> list[Tensor]:
        """Return the tensors behind this rank's shards, in the order of `Layout.shards`; the same list while they are.

        Those of another layout are forgotten.
        """
        if self._layout is not layout:
            self._tensors = [
                shard.tensor
                for param, pattern in zip(layout.manifest.params, layout.pattern_of.tolist(), strict=True)
                if pattern != NONE
                for shard in self._own.get(param.name, ())
            ]
            self._layout = layout
        return self._tensors

    def forget(self) -> None:
        """Let go of the tensors."""
        self._shards = self._manifest = self._layout = self._regions = None
        self._own, self._tensors = {}, []
