"""Pieces as the copies that move them between memories that an engine reaches by address."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.copying.boxes import Boxes, Integers, Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weight_transfer.plan.pieces import Pieces


@attrs.frozen(eq=False)
class Tensors:
    """Where tensors lie, as columns: one row per shard of a rank, or per target of a worker.

    Attributes:
        base: int64 ``[tensors]``: address, or offset in some memory, of the first element, in bytes.
        strides: int64 ``[tensors, D]``: in elements; 0 where a tensor has fewer dimensions.
    """

    base: Integers
    strides: Integers

    @classmethod
    def of(cls, bases: Sequence[int], strides: Sequence[Sequence[int]], dims: int) -> Tensors:
        """Take a row for each tensor, with room for ``dims`` dimensions."""
        table = np.zeros((len(bases), dims), dtype=np.int64)
        for row, own in zip(table, strides, strict=True):
            row[: len(own)] = own
        return cls(np.array(bases, dtype=np.int64), table)


def boxes_of(pieces: Pieces, sources: Tensors, targets: Tensors) -> Boxes:
    """Return the copies that move pieces, with as few and as long runs as both sides allow.

    Args:
        pieces: whose shards are all of one rank; each has one dtype on both sides.
        sources: the rank's shards.
        targets: the worker's targets.
    """
    source_steps = sources.strides[pieces.shard] * pieces.itemsize[:, None]
    target_steps = targets.strides[pieces.target] * pieces.itemsize[:, None]
    source = sources.base[pieces.shard] + (pieces.source_start * source_steps).sum(axis=1)
    target = targets.base[pieces.target] + (pieces.target_start * target_steps).sum(axis=1)
    return Views(source, target, pieces.shape, source_steps, target_steps, pieces.itemsize).boxes()
