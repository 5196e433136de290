"""The unrecorded way: the model's own loader runs at each update, as in vLLM's layerwise reload."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weight_transfer import Manifest
    from weight_transfer_vllm.layers import VllmLayers, Weights


class LayerwiseLoader:
    """Give it to a `WeightReceiver` as ``load_weights``.

    Args:
        layers: the model.
    """

    retains = True

    def __init__(self, layers: VllmLayers) -> None:
        self._layers = layers
        self._opened = False
        self._names_count = False

    def begin(self, manifest: Manifest) -> None:
        self._opened = False
        self._names_count = bool(self._layers.required())

    def __call__(self, weights: Weights) -> object:
        if not self._opened:
            self._opened = True
            self._layers.open(())
        names = self._layers.run_loader(weights)
        return names if self._names_count else None

    def finish(self) -> None:
        self._layers.finish()
        self._opened = False

    def abort(self, reason: str, touched: bool) -> None:
        if self._opened:
            self._opened = False
            self._layers.restore(reason)
