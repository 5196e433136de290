"""The cast that the configuration asks for, with the dtypes that the workers have told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.config.settings import RECEIVER
from weight_transfer.errors import ConfigError
from weight_transfer.model.casting import declared_dtypes
from weight_transfer.model.info import MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.source import WeightSource
    from weight_transfer.session.fleet import Fleet
    from weight_transfer.session.outgoing import Outgoing


class ConfiguredCast:
    """Puts casts around what is sent.

    Args:
        patterns: a dtype by pattern, or ``"receiver"``.
        fleet: the workers, who tell theirs when they join.
        asks: whether this trainer rank is the one that talks to them about a source.
    """

    def __init__(self, patterns: Mapping[str, str], fleet: Fleet, asks: Callable[[WeightSource], bool]) -> None:
        self._patterns = patterns
        self._fleet = fleet
        self._asks = asks
        self._asking = False

    def around(self, source: WeightSource, outgoing: Outgoing) -> WeightSource:
        """Return the source with its weights cast; the source itself if nothing is to be cast.

        Raises:
            ConfigError: ``"receiver"`` has no meaning for this target.
            HandshakeError: the workers do not know, or do not agree.
        """
        if not self._patterns:
            return source
        if RECEIVER in self._patterns.values():
            if outgoing.target != MODEL:
                raise ConfigError(
                    f'cast: the workers tell the dtypes of their model alone, so "{RECEIVER}" means nothing for target '
                    f"{outgoing.target!r}; name a dtype."
                )
            source.manifest()  # from here on it knows its device, and whether it is sharded
            self._asking = self._asks(source)
            if self._asking and self._meets_workers(source):
                outgoing.forget_cast()  # whoever joined now may have other dtypes
        return outgoing.cast(source, self._declared, self._told)

    def _meets_workers(self, source: WeightSource) -> bool:
        """Have those join that have not, for what they have to say; return whether there were any."""
        self._fleet.place(source.device)
        if all(peer.joined for peer in self._fleet.peers):
            return False
        self._fleet.connect()
        return True

    def _declared(self, manifest: Manifest) -> dict[str, str]:
        chosen = declared_dtypes(manifest, self._patterns)
        return {name: dtype for name, dtype in chosen.items() if dtype != RECEIVER}

    def _told(self, manifest: Manifest) -> dict[str, str]:
        chosen = declared_dtypes(manifest, self._patterns)
        called = {name: [name] for name, dtype in chosen.items() if dtype == RECEIVER}
        for alias, name in manifest.aliases.items():
            if name in called:
                called[name].append(alias)
        return self._fleet.dtypes(called) if self._asking else {}
