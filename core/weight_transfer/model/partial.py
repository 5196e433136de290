"""Some of the weights of a source, to be sent while the workers keep the others."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.selection import SelectedSource

if TYPE_CHECKING:
    from weight_transfer.model.source import WeightSource


class PartialSource(SelectedSource):
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
        super().__init__(source, Manifest((), partial=True))
        self.only = tuple(only)
        self._whole: Manifest | None = None

    def manifest(self) -> Manifest:
        """Return the part of the source's manifest, marked as one.

        Raises:
            ConfigError: a pattern matches no weight.
        """
        whole = self.source.manifest()
        if whole is not self._whole:
            names = _matching(whole, self.only)
            params = (param for param in whole.params if param.name in names)
            aliases = {alias: name for alias, name in whole.aliases.items() if name in names}
            self._select(Manifest(params, aliases, partial=True))
            self._whole = whole
        return self._manifest

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
