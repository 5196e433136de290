"""Some of the weights of a source: those that do not go by region."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from weight_transfer.model.source import WeightSource

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.shards import Shard


class SelectedSource(WeightSource):
    """The weights of a source that a manifest lists, a part of the source's own in its order."""

    def __init__(self, source: WeightSource, manifest: Manifest) -> None:
        self.source = source
        self._manifest = manifest
        self._whole: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        self._found: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {})

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
        return {name: shards for name, shards in self.source.shards().items() if name in self._manifest.by_name}

    def _look(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        whole = self.source.resident(), self.source.masters()
        if self._whole is None or whole[0] is not self._whole[0] or whole[1] is not self._whole[1]:
            names = self._manifest.by_name
            resident, masters = ({name: some[name] for name in names if name in some} for some in whole)
            self._whole, self._found = whole, (resident, masters)
        return self._found

    @property
    def device(self) -> str:
        return self.source.device

    @property
    def collective(self) -> bool:
        return self.source.collective

    @property
    def reuses_memory(self) -> bool:
        return self.source.reuses_memory

    def __repr__(self) -> str:
        return f"{self.source!r}, {len(self._manifest.params)} of its weights"
