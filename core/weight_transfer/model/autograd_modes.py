"""In which of torch's modes weights are read and written, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import torch

from weight_transfer.model.abilities import offers
from weight_transfer.model.loading import InPlaceLoader
from weight_transfer.model.targets import NO_TARGETS, RegionLoader, tensors_of

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.loading import WeightLoader
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


@contextmanager
def reading() -> Iterator[None]:
    """The mode for a trainer, and for joining: what is made there outlives the call, and is no inference tensor."""
    with _inference(False), torch.no_grad():
        yield


class Writing:
    """The mode for a worker: tensors that were made in inference mode can be written inside it only.

    Args:
        model: whose tensors are written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: tuple[object, object] | None = None
        self._inference = False

    @contextmanager
    def __call__(self, loader: WeightLoader, manifest: Manifest) -> Iterator[None]:
        """Be in that mode; ``loader`` has begun the update of these weights."""
        whole = loader.destinations() if offers(loader, InPlaceLoader) else None
        parts: Targets = NO_TARGETS
        if offers(loader, RegionLoader) and (whole is None or len(whole) < len(manifest.params)):
            parts = loader.targets(manifest)
        if whole is None or self._seen is None or not (whole is self._seen[0] and parts is self._seen[1]):
            others = chain(self._model.parameters(), self._model.buffers()) if whole is None else whole.values()
            self._inference = any(map(torch.Tensor.is_inference, chain(tensors_of(parts), others)))
            self._seen = whole, parts
        with _inference(self._inference), torch.no_grad():
            yield


def _inference(mode: bool) -> AbstractContextManager[object]:
    """Enter or leave inference mode for the length of a ``with`` block; mostly that is so already."""
    return nullcontext() if torch.is_inference_mode_enabled() is mode else torch.inference_mode(mode)
