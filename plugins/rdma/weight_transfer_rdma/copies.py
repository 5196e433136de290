"""Strided copies between parts of tensors and the buckets in which they are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from weight_transfer.authoring import INTEGERS, Pieces, as_bits, torch_dtype

if TYPE_CHECKING:
    from weight_transfer_rdma.plan import Integers

_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def parts(tensors: Sequence[torch.Tensor], numbers: Integers, starts: Integers, shapes: Integers) -> list[torch.Tensor]:
    """Return views of boxes in tensors.

    Args:
        tensors: with any strides.
        numbers: which tensor each box is in, int64 ``[boxes]``.
        starts: its first element, int64 ``[boxes, dims]``, filled up where the tensor has fewer dimensions.
        shapes: its elements, likewise.
    """
    views = []
    for number, start, shape in zip(numbers.tolist(), starts.tolist(), shapes.tolist(), strict=True):
        tensor = tensors[number].detach()
        slices = zip(start, shape, tensor.shape, strict=False)
        views.append(tensor[tuple(slice(first, first + size) for first, size, _ in slices)])
    return views


def packed(
    buffer: torch.Tensor, offsets: Integers, pieces: Pieces, dtypes: Sequence[str], dims: Sequence[int]
) -> list[torch.Tensor]:
    """Return pieces that lie one after another in a bucket as tensors over it.

    Args:
        buffer: the bucket, uint8.
        offsets: first byte of each piece.
        pieces: the pieces.
        dtypes: their dtypes' names.
        dims: their numbers of dimensions.
    """
    views = []
    columns = zip(offsets.tolist(), pieces.sizes.tolist(), pieces.shape.tolist(), dtypes, dims, strict=True)
    for offset, nbytes, shape, dtype, own in columns:
        views.append(buffer[offset : offset + nbytes].view(torch_dtype(dtype)).view(shape[:own]))
    return views


class Copies:
    """Copies that are done again and again, in one batch.

    Args:
        find: returns targets and sources.
        keep: whether these are kept. Views keep a storage from being adopted or resized, which only matters on the CPU,
            where finding them anew is cheap beside the copies.
    """

    def __init__(self, find: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]], keep: bool) -> None:
        self._find, self._keep = find, keep
        self._found: tuple[_Pairs, _Pairs] | None = None

    def run(self) -> None:
        """Copy; a source of another dtype is converted, with the bits of ``tensor.to``."""
        found = self._found or _sorted(*self._find())
        if self._keep:
            self._found = found
        alike, others = found
        with torch.no_grad():
            if alike:
                torch._foreach_copy_([target for target, _ in alike], [source for _, source in alike])
            for target, source in others:
                target.copy_(source)


def _sorted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> tuple[_Pairs, _Pairs]:
    """Return what can be copied in one batch, as integers, and the rest."""
    alike, others = [], []
    for target, source in zip(targets, sources, strict=True):
        has_bits = target.element_size() in INTEGERS
        plain = not (source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg())
        if target.dtype is source.dtype and has_bits and plain:
            alike.append((as_bits(target), as_bits(source)))  # a float's copy may change the bits of NaNs
        else:
            others.append((target, source))
    return alike, others
