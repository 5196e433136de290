"""Many digests told by few: two sides compare these, and know which of the many differ."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Self

import attrs
import numpy as np
import xxhash

if TYPE_CHECKING:
    from weight_transfer.memory.chunks import Words

_LINE = 16  # hexadecimal digits of a digest


@attrs.frozen
class DigestTable:
    """Digests in a square table, row by row, of which each row and each column has a digest.

    The table of 10,000 digests is told by 200. Where one of the many differs, so do its row and its column, which say
    which one it is.

    Attributes:
        count: how many there are.
        rows: the digests of the rows, 16 hexadecimal digits each.
        columns: the digests of the columns.
    """

    count: int
    rows: str
    columns: str

    @classmethod
    def of(cls, digests: Words) -> Self:
        """Put digests, uint64 ``[count]``, into a table."""
        side = _side(len(digests))
        table = np.zeros(side * side, dtype="<u8")
        table[: len(digests)] = digests
        square = table.reshape(side, side)
        return cls(len(digests), _lines(square), _lines(square.T))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` gave.

        Raises:
            ValueError: it is something else.
        """
        match = re.fullmatch(r"(\d{1,9}) ([0-9a-f]*) ([0-9a-f]*)", text)
        if match is None or not len(match[2]) == len(match[3]) == _LINE * _side(int(match[1])):
            raise ValueError(f"expected a table of digests, got {text[:50]!r}")
        return cls(int(match[1]), match[2], match[3])

    def to_text(self) -> str:
        """Return it as one text."""
        return f"{self.count} {self.rows} {self.columns}"

    def differing(self, other: Self) -> list[int]:
        """Return the numbers of digests of which some differ: exactly that one, if it is one. Both have as many."""
        side = _side(self.count)
        rows, columns = _unlike(self.rows, other.rows), _unlike(self.columns, other.columns)
        met = [row * side + column for row in rows for column in columns]
        return [number for number in met if number < self.count]


def _side(count: int) -> int:
    return math.isqrt(count - 1) + 1 if count else 0


def _lines(square: Words) -> str:
    return "".join(xxhash.xxh3_64_hexdigest(line.tobytes()) for line in square)


def _unlike(mine: str, theirs: str) -> list[int]:
    starts = range(0, len(mine), _LINE)
    return [start // _LINE for start in starts if mine[start : start + _LINE] != theirs[start : start + _LINE]]
