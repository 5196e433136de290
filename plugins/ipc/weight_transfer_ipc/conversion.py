"""The trainer's masters, read where they lie: the worker's one copy converts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weight_transfer.authoring import destinations_of, torch_dtype

if TYPE_CHECKING:
    from weight_transfer.authoring import Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.views import Views


def split(views: Views, manifest: Manifest) -> tuple[Views, Views]:
    """Return the views that have the manifest's dtypes, and those of masters."""
    exact: Views = []
    masters: Views = []
    for name, view in views:
        same = view.dtype is torch_dtype(manifest.by_name[name].dtype)
        (exact if same else masters).append((name, view))
    return exact, masters


def load_converted(masters: Views, manifest: Manifest, load_weights: LoadWeights) -> None:
    """Load masters as the manifest's dtypes; a loader of the user's own is given new tensors."""
    destinations = destinations_of(load_weights)
    if destinations is None:
        load_weights([(name, view.to(torch_dtype(manifest.by_name[name].dtype))) for name, view in masters])
        return
    load_weights.write_in_place()  # type: ignore[attr-defined]  # whoever has destinations has this too
    for name, view in masters:
        target = destinations[name]
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(view)
    load_weights([(name, destinations[name]) for name, _ in masters])
