"""Few digests say which of many differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer.memory.digest_table import DigestTable

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
DIGESTS = st.lists(st.integers(0, 2**64 - 1), max_size=40).map(lambda some: np.array(some, dtype=np.uint64))


@given(DIGESTS)
def test_a_table_travels_as_text(digests: Words) -> None:
    table = DigestTable.of(digests)
    assert DigestTable.from_text(table.to_text()) == table
    assert table.differing(table) == []


@given(DIGESTS.filter(len), st.data())
def test_the_one_that_differs_is_named(digests: Words, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(digests) - 1))
    changed = digests.copy()
    changed[number] ^= np.uint64(data.draw(st.integers(1, 2**64 - 1)))
    assert DigestTable.of(digests).differing(DigestTable.of(changed)) == [number]


def test_among_those_that_are_named_are_all_that_differ() -> None:
    digests = np.arange(100, dtype=np.uint64)
    changed = digests.copy()
    changed[[3, 58]] += np.uint64(1000)
    assert {3, 58} <= set(DigestTable.of(digests).differing(DigestTable.of(changed))) <= {3, 8, 53, 58}


def test_digests_that_change_places_differ() -> None:
    digests = np.arange(9, dtype=np.uint64)
    assert DigestTable.of(digests) != DigestTable.of(digests[::-1].copy())


def test_thousands_are_told_by_hundreds() -> None:
    assert len(DigestTable.of(np.arange(10_000, dtype=np.uint64)).to_text()) < 3300


@pytest.mark.parametrize("text", ["", "1", "1 0 0", f"2 {'0' * 32} {'0' * 16}", "x", f"1 {'g' * 16} {'0' * 16}"])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a table of digests"):
        DigestTable.from_text(text)
