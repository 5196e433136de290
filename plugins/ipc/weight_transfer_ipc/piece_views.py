"""Pieces as pairs of tensors, for torch's own copies: on the CPU, and wherever the kernel cannot go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weight_transfer_ipc.device_memory import bytes_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from weight_transfer.authoring import Pieces

    Integers = NDArray[np.int64]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sources_of(pieces: Pieces, shards: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the part of its shard that each piece is; None stands for shards that no piece is of."""
    return _parts(shards, pieces.shard.tolist(), pieces.source_start, pieces.shape)


def targets_of(pieces: Pieces, targets: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of its target that each piece fills."""
    return _parts(targets, pieces.target.tolist(), pieces.target_start, pieces.shape)


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
    bits = _BITS.get(tensor.itemsize)
    return tensor.view(bits) if tensor.dtype is other.dtype and bits is not None else tensor


def _parts(tensors: Sequence[Tensor | None], numbers: list[int], start: Integers, shape: Integers) -> list[Tensor]:
    parts = []
    for number, begin, size in zip(numbers, start.tolist(), shape.tolist(), strict=True):
        tensor = tensors[number]
        assert tensor is not None
        part = tensor.detach()
        own = size[: part.dim()]
        if part.shape != torch.Size(own):
            stride = part.stride()
            offset = sum(step * first for step, first in zip(stride, begin, strict=False))
            part = part.as_strided(own, stride, part.storage_offset() + offset)
        parts.append(part)
    return parts
