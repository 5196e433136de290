"""Some of the weights of a source: those that a manifest lists."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from weight_transfer.model.source import WrappingSource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.shards import Shard
    from weight_transfer.model.source import WeightSource


class SelectedSource(WrappingSource):
    """The weights of a source that a manifest lists, a part of the source's own in its order."""

    def __init__(self, source: WeightSource, manifest: Manifest) -> None:
        super().__init__(source)
        self._select(manifest)

    def _select(self, manifest: Manifest) -> None:
        """Have another part from now on."""
        self._manifest = manifest
        self._given: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        self._found: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {})
        self._all_shards: Mapping[str, Sequence[Shard]] | None = None
        self._shards: Mapping[str, Sequence[Shard]] = {}

    def manifest(self) -> Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.source.stream(self._manifest.by_name)

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        return self.source.stream(self._manifest.by_name.keys() & set(names))

    def resident(self) -> Mapping[str, Tensor]:
        return self._look()[0]

    def masters(self) -> Mapping[str, Tensor]:
        return self._look()[1]

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        shards = self.source.shards()
        if shards is not self._all_shards:
            self._all_shards = shards
            self._shards = {name: own for name, own in shards.items() if name in self._manifest.by_name}
        return self._shards

    def _look(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        given = self.source.resident(), self.source.masters()
        if self._given is None or any(map(operator.is_not, given, self._given)):
            names = self._manifest.by_name
            resident, masters = ({name: some[name] for name in names if name in some} for some in given)
            self._given, self._found = given, (resident, masters)
        return self._found

    @property
    def reuses_memory(self) -> bool:
        return self.source.reuses_memory

    def __repr__(self) -> str:
        return f"{self.source!r}, {len(self._manifest.params)} of its weights"
