"""In which of torch's modes weights are read and written, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch

from weight_transfer.model.loading import InPlaceLoader

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.loading import WeightLoader


@contextmanager
def reading() -> Iterator[None]:
    """The mode for a trainer, and for joining: what is made there outlives the call, and is no inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Writing:
    """The mode for a worker: tensors that were made in inference mode can be written inside it only.

    Args:
        model: whose tensors are written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: Mapping[str, torch.Tensor] | None = None
        self._inference = False

    @contextmanager
    def __call__(self, loader: WeightLoader) -> Iterator[None]:
        """Be in that mode; ``loader`` has begun the update."""
        weights = loader.destinations() if isinstance(loader, InPlaceLoader) else None
        if weights is None or weights is not self._seen:
            tensors = weights.values() if weights else chain(self._model.parameters(), self._model.buffers())
            self._inference = any(map(torch.Tensor.is_inference, tensors))
            self._seen = weights
        with torch.inference_mode(self._inference), torch.no_grad():
            yield
