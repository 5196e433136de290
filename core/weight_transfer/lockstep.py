"""A source whose passes are always finished, so that the other trainer ranks are never left in a collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from weight_transfer.source import WeightSource

if TYPE_CHECKING:
    import torch

    from weight_transfer.manifest import Manifest


class LockstepSource(WeightSource):
    """Wraps a source for one update.

    Args:
        source: what is sent.
        passes: how often every rank iterates it in this update.

    Attributes:
        error: what the source raised, if it failed; engines may take it for something else.
    """

    def __init__(self, source: WeightSource, passes: int) -> None:
        self._source = source
        self._passes = passes
        self._current: Iterator[tuple[str, torch.Tensor]] = iter(())
        self.error: BaseException | None = None

    def manifest(self) -> Manifest:
        return self._source.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._passes -= 1
        self._current = self._watched()
        return self._current

    def resident(self) -> Mapping[str, torch.Tensor]:
        return self._source.resident()

    def masters(self) -> Mapping[str, torch.Tensor]:
        return self._source.masters()

    @property
    def device(self) -> str:
        return self._source.device

    @property
    def collective(self) -> bool:
        return self._source.collective

    def _watched(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from self._source
        except Exception as error:
            self.error = error
            raise

    def drain(self) -> None:
        """Finish the pass that is under way and run those that are left, if the source runs collectives."""
        if not self.collective:
            return
        for _ in self._current:
            pass
        while self._passes > 0:
            for _ in self:
                pass
