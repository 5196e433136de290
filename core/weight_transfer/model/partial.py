"""Some of the weights of a source, to be sent while the workers keep the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.source import NO_SHARDS, WeightSource

if TYPE_CHECKING:
    import torch

    from weight_transfer.model.shards import Shard


class PartialSource(WeightSource):
    """The weights of a source whose names match.

    Args:
        source: all weights.
        only: glob patterns of names. One that matches nothing is an error.

    Raises:
        ConfigError: ``only`` is no list of patterns.
    """

    def __init__(self, source: WeightSource, only: Sequence[str]) -> None:
        if isinstance(only, str) or not only or not all(isinstance(pattern, str) for pattern in only):
            raise ConfigError(f'only: expected a list of names or patterns such as ["lm_head.*"], got {only!r}.')
        self.source = source
        self.only = tuple(only)
        self._whole: Manifest | None = None
        self._manifest = Manifest((), partial=True)
        self._all_shards: Mapping[str, Sequence[Shard]] | None = None
        self._shards: Mapping[str, Sequence[Shard]] = NO_SHARDS

    def manifest(self) -> Manifest:
        """Return the part of the source's manifest, marked as one.

        Raises:
            ConfigError: a pattern matches no weight.
        """
        whole = self.source.manifest()
        if whole is not self._whole:
            names = _matching(whole, self.only)
            self._manifest = Manifest(
                (param for param in whole.params if param.name in names),
                {alias: name for alias, name in whole.aliases.items() if name in names},
                partial=True,
            )
            self._whole, self._all_shards = whole, None
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.stream(self._manifest.by_name)

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.stream(self._manifest.by_name.keys() & set(names))

    def resident(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.source.resident().items() if name in self._manifest.by_name}

    def masters(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.source.masters().items() if name in self._manifest.by_name}

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        shards = self.source.shards()
        if shards is not self._all_shards:
            self._all_shards = shards
            self._shards = {name: own for name, own in shards.items() if name in self._manifest.by_name}
        return self._shards

    @property
    def device(self) -> str:
        return self.source.device

    @property
    def collective(self) -> bool:
        return self.source.collective

    @property
    def whole(self) -> bool:
        return self.source.whole

    @property
    def reuses_memory(self) -> bool:
        return self.source.reuses_memory

    def __repr__(self) -> str:
        return f"{self.source!r}, only {', '.join(self.only)}"


def _matching(whole: Manifest, patterns: Sequence[str]) -> set[str]:
    """Return the names under which what matches travels: what is tied matches under each of its names."""
    travels_as = {param.name: param.name for param in whole.params} | dict(whole.aliases)
    found: set[str] = set()
    for pattern in patterns:
        some = {name for called, name in travels_as.items() if fnmatchcase(called, pattern)}
        if not some:
            raise ConfigError(f"only: {pattern!r} matches none of the {len(whole.params)} weights.")
        found |= some
    return found
