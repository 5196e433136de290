"""Pieces as views of the tensors that they are parts of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from weight_transfer.copying.boxes import Integers
    from weight_transfer.plan.pieces import Pieces


def sources_of(pieces: Pieces, shards: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the part of its shard that each piece is; None stands for shards that no piece is of."""
    return _parts(shards, pieces.shard.tolist(), pieces.source_start, pieces.shape)


def targets_of(pieces: Pieces, targets: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of its target that each piece fills."""
    return _parts(targets, pieces.target.tolist(), pieces.target_start, pieces.shape)


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
