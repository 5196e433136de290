"""Weights that are kept apart while they arrive, and loaded when all of them are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from weight_transfer.model.abilities import offers
from weight_transfer.model.dtypes import TypedLoader
from weight_transfer.model.loading import ReadableLoader
from weight_transfer.model.targets import NO_TARGETS

if TYPE_CHECKING:
    from weight_transfer.config.settings import Staging
    from weight_transfer.model.loading import WeightLoader, Weights
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.targets import Targets


class StagedLoader:
    """Takes weights into memory of its own, and leaves the model alone until `commit`.

    That memory is allocated anew for each update, and given back when it has been loaded. It needs all weights whole,
    so that nothing comes by region, and engines cannot write into the model's own tensors.

    Args:
        loader: which loads them in the end.
        staging: where they are kept: in host memory (pinned, if they come from a GPU), or on the device where they are.
    """

    def __init__(self, loader: WeightLoader, staging: Staging) -> None:
        self.loader = loader
        self._staging = staging
        self._kept: list[list[tuple[str, torch.Tensor, torch.device]]] = []

    disturbs = False

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.loader.warnings

    def dtypes(self) -> Mapping[str, str] | None:
        """Return those of the loader, if it knows."""
        return self.loader.dtypes() if offers(self.loader, TypedLoader) else None

    def landed(self, manifest: Manifest) -> Targets:
        """Return those of the loader."""
        return self.loader.landed(manifest) if offers(self.loader, ReadableLoader) else NO_TARGETS

    def begin(self, manifest: Manifest) -> None:
        self._kept = []
        self.loader.begin(manifest)

    def __call__(self, weights: Weights) -> None:
        self._kept.append([(name, self._copied(tensor), tensor.device) for name, tensor in weights])

    def finish(self) -> None:
        """Everything is there, and nothing is loaded yet."""

    def commit(self) -> None:
        """Load everything, part by part as it arrived, and where it arrived; nobody may use the model meanwhile."""
        parts, self._kept = self._kept[::-1], []
        while parts:
            self.loader([(name, kept.to(device)) for name, kept, device in parts.pop()])
        self.loader.finish()

    def abort(self, reason: str, touched: bool) -> None:
        self._kept = []
        self.loader.abort(reason, touched)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._staging == "device":
            return tensor.clone()
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor)
