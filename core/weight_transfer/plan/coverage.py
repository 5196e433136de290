"""Whether the shards of a parameter cover it: every element is some rank's, and none lies in two different shards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.regions import Region

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Integers
    from weight_transfer.model.manifest import ParamMeta


def require_cover(rows: Integers, param: ParamMeta) -> None:
    """Raise unless shards cover a parameter once, replicas apart.

    Args:
        rows: int64 ``[shards, 1 + 2 * dims]``: rank, offset and shape of each.
        param: the parameter.

    Raises:
        ManifestMismatchError: a shard has another number of dimensions or lies beyond the parameter; two overlap; or an
            element is nobody's. The message names the parameter and, where there are any, the ranks.
    """
    _require_inside(rows, param)
    _, first = np.unique(rows[:, 1:], axis=0, return_index=True)
    different = rows[first]
    volumes = _shapes(different).prod(axis=1)
    different, covered = different[volumes > 0], int(volumes.sum())
    _require_apart(different, param)
    total = math.prod(param.shape)
    if covered != total:
        raise ManifestMismatchError(
            f"The trainer's ranks hold {covered} of the {total} elements of {param}; every part of a weight must be "
            "some rank's."
        )


def _require_inside(rows: Integers, param: ParamMeta) -> None:
    dims = len(param.shape)
    if rows.shape[1] != 1 + 2 * dims:
        has = (rows.shape[1] - 1) / 2
        raise ManifestMismatchError(
            f"Trainer rank {rows[0, 0]} has a shard of {has:g} dimensions of {param}; it must have {dims}."
        )
    offsets, shapes = rows[:, 1 : 1 + dims], _shapes(rows)
    limits = np.array(param.shape, dtype=np.int64)
    inside = (offsets >= 0) & (shapes >= 0) & (offsets <= limits) & (shapes <= limits - offsets.clip(0, limits))
    outside = np.flatnonzero(~inside.all(axis=1))
    if len(outside):
        worst = outside[0]
        where = f"{shapes[worst].tolist()} from {offsets[worst].tolist()} on"
        raise ManifestMismatchError(f"Trainer rank {rows[worst, 0]} has {where} of {param}, which lies beyond it.")


def _require_apart(rows: Integers, param: ParamMeta) -> None:
    dims = len(param.shape)
    begin = rows[:, 1 : 1 + dims]
    end = begin + _shapes(rows)
    for number in range(len(rows) - 1):
        others = slice(number + 1, None)
        overlaps = ((begin[others] < end[number]) & (begin[number] < end[others])).all(axis=1)
        if overlaps.any():
            one, two = rows[number], rows[number + 1 + int(overlaps.argmax())]
            raise ManifestMismatchError(
                f"Trainer ranks {one[0]} and {two[0]} have {_region(one)} and {_region(two)} of {param}, which "
                "overlap; shards must lie apart, or be replicas of one region."
            )


def _shapes(rows: Integers) -> Integers:
    return rows[:, 1 + (rows.shape[1] - 1) // 2 :]


def _region(row: Integers) -> Region:
    dims = (len(row) - 1) // 2
    return Region(row[1 : 1 + dims].tolist(), row[1 + dims :].tolist())
