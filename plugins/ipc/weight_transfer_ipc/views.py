"""The trainer's exported parameters as tensors over mapped memory, in parts of a bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weight_transfer.errors import ManifestMismatchError

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Export, Manifest

Views = list[tuple[str, "torch.Tensor"]]


def views_of(export: Export, manifest: Manifest, memory: Mapping[int, torch.Tensor]) -> Views:
    """Return the exported parameters, by name, over ``memory`` (bytes by segment id).

    Raises:
        ManifestMismatchError: the table of addresses does not fit the manifest or the memory.
    """
    if not len(export.segment_ids) == len(export.offsets) == len(manifest.params):
        raise ManifestMismatchError(
            "The trainer's table of addresses and its manifest differ in length.", backend="ipc"
        )
    try:
        return export.views(manifest, memory)
    except (RuntimeError, KeyError) as error:
        raise ManifestMismatchError(
            "The trainer's table of addresses points beyond its segments.", backend="ipc", cause=str(error)
        ) from error


def chunks(views: Views, nbytes: int) -> list[Views]:
    """Cut ``views`` into parts of at most ``nbytes``, or of one larger tensor."""
    parts: list[Views] = []
    room = 0
    for name, view in views:
        size = view.numel() * view.element_size()
        if size > room or not parts:
            parts.append([])
            room = nbytes
        parts[-1].append((name, view))
        room -= size
    return parts
