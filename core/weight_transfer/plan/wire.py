"""Integers as they come out of JSON: taken only if they are integers, in the form that is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def column_from_wire(data: Any) -> NDArray[np.int64]:
    """Return a list of integers as int64 ``[numbers]``.

    Raises:
        ValueError: it is something else.
    """
    return _integers(data, 1)


def table_from_wire(data: Any) -> NDArray[np.int64]:
    """Return a list of equally long lists of integers as int64 ``[rows, columns]``, with at least one column.

    Raises:
        ValueError: it is something else.
    """
    table = _integers(data, 2)
    if not table.shape[1]:
        raise ValueError("rows without a column")
    return table


def texts_from_wire(data: Any) -> tuple[str, ...]:
    """Return a list of texts.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise ValueError(f"no list of texts, but {data!r}")
    return tuple(data)


def _integers(data: Any, dims: int) -> NDArray[np.int64]:
    if not isinstance(data, list):
        raise ValueError(f"no list, but {type(data).__name__}")
    if not data:
        return np.zeros((0, 1)[:dims], dtype=np.int64)
    found = np.array(data)  # ValueError if the rows differ in length
    if found.ndim != dims or (found.dtype != np.int64 and found.size):
        raise ValueError("no integers of 64 bits in the form that was expected")
    return found.astype(np.int64)
