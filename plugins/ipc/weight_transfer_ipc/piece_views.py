"""Copies between the views that pieces are, by torch: on the CPU, and wherever the kernel cannot go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weight_transfer.authoring import as_bits
from weight_transfer_ipc.device_memory import bytes_at

if TYPE_CHECKING:
    from torch import Tensor


def unowned(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory anew, by its address: it does not keep the memory, and can always be written."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = bytes_at(tensor.data_ptr(), (last + 1) * tensor.itemsize, tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the target at its place; dtypes that differ are converted, others keep their bits."""
    pairs = list(zip(targets, sources, strict=True))
    for frozen in (False, True):
        own = [(_bits(t, s), _bits(s, t)) for t, s in pairs if t.is_inference() is frozen]
        if own:
            with torch.inference_mode(frozen), torch.no_grad():
                torch._foreach_copy_([target for target, _ in own], [source for _, source in own])


def _bits(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor as whole numbers, on a GPU, where a float's copy may change the bits of NaNs."""
    if tensor.device.type == "cpu" and other.device.type == "cpu":
        return tensor
    return as_bits(tensor) if tensor.dtype is other.dtype else tensor
