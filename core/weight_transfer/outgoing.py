"""What a sender keeps from update to update of one target: its version, and the sources that it was sent from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.info import WireEncoder
from weight_transfer.partial import PartialSource
from weight_transfer.source import ModuleSource, WeightSource, as_source

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.events import Version


class Outgoing:
    """One target's side in the trainer.

    Attributes:
        target: its name.
        version: the last one that was sent; None before the first.
        encoder: of its update infos.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.version: Version | None = None
        self.encoder = WireEncoder()
        self._module: ModuleSource | None = None
        self._part: PartialSource | None = None

    def source(self, weights: nn.Module | WeightSource, only: Sequence[str] | None) -> WeightSource:
        """Return what is sent; the same object for the same arguments, because sources remember their manifests.

        Raises:
            ConfigError: ``weights`` is neither a module nor a source, or a part is to be sent of what was never whole.
        """
        source = self._whole(weights)
        if only is None:
            return source
        if self.version is None:
            raise ConfigError(
                "only: the workers need all weights before they can be sent some; call send without only first."
            )
        if self._part is None or self._part.source is not source or self._part.only != tuple(only):
            self._part = PartialSource(source, only)
        return self._part

    def _whole(self, weights: nn.Module | WeightSource) -> WeightSource:
        if self._module is None or self._module.module is not weights:
            source = as_source(weights)
            if source is weights or not isinstance(source, ModuleSource):
                return source
            self._module = source
        return self._module
