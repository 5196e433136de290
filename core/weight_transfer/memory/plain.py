"""The bytes of a tensor in row-major order: where they lie, if they lie there so, or a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.plan.buckets import as_bytes, laid_out

if TYPE_CHECKING:
    import torch


def lies_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read a tensor where it lies; thousands of views would take longer than it does."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.dtype is dtype and tensor.is_contiguous() and not is_lazy and tensor.data_ptr() % 8 == 0


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes of a tensor in row-major order, uint8 ``[nbytes]``: its own memory, or a copy's."""
    return as_bytes(laid_out(tensor.detach().to(dtype)))
