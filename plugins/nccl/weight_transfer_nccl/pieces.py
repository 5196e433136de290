"""The bytes of tensors, cut as a plan says: of tensors that stay in place, and of tensors that are made on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weight_transfer.authoring import Slot, as_bytes, copy_converted, laid_out, torch_dtype

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Manifest, WeightSource
    from weight_transfer_nccl.plan import Batch


def piece_of(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Return the bytes of a contiguous tensor that travel in a slot, uint8 of shape ``[slot.nbytes]``."""
    return as_bytes(tensor)[slot.start : slot.start + slot.nbytes]


class StreamedBytes:
    """The bytes of a source that is iterated: a tensor is kept until its last byte was asked for.

    What the source may change or free once the next tensor is asked for is copied before.
    """

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(source)
        self._device = device
        self._copies = source.reuses_memory
        self._held: dict[int, torch.Tensor] = {}
        self._read = 0

    def pieces(self, slots: Sequence[Slot]) -> list[torch.Tensor]:
        """Return the bytes of each slot, uint8."""
        pieces = []
        for slot in slots:
            while self._read <= slot.param:
                _, tensor = next(self._tensors)
                kept = laid_out(tensor.to(self._device))
                self._held[self._read] = kept.clone() if self._copies and kept is tensor else kept
                self._read += 1
            pieces.append(piece_of(self._held[slot.param], slot))
            if slot.last:
                del self._held[slot.param]
        return pieces


class Masters:
    """Tensors that are converted on their way into a bucket, in the manifest's order."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._held: dict[int, torch.Tensor] = {}

    def convert(self, batch: Batch, manifest: Manifest, views: Sequence[torch.Tensor]) -> None:
        """Fill a batch's places in its bucket (uint8), the small tensors' first."""
        for slot, view in zip((*batch.packed, *batch.direct), views, strict=True):
            tensor = self._held.get(slot.param)
            if tensor is None:
                tensor = self._held[slot.param] = laid_out(self._tensors[slot.param])
            if slot.nbytes:
                copy_converted(tensor, slot, torch_dtype(manifest.params[slot.param].dtype), view)
            if slot.last:
                del self._held[slot.param]
