"""Which ranges become one read, and which must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weight_transfer import ManifestMismatchError
from weight_transfer_rdma.plan import Regions, merge


def _merge(local: list[int], remote: list[int], sizes: list[int], **given: list[Any]) -> list[list[int]]:
    count = len(local)
    columns = [np.array(column, dtype=np.int64) for column in (local, remote, sizes)]
    regions = [np.array(given.get(key, [0] * count), dtype=np.int64) for key in ("here", "there")]
    rows: list[list[int]] = merge(*columns, *regions, np.array(given.get("padding", [511] * count))).tolist()
    return rows


def test_ranges_that_follow_each_other_at_the_same_distance_become_one() -> None:
    assert _merge([1000, 1256, 1512], [5000, 5256, 5512], [256, 200, 3]) == [[1000, 5000, 515]]


def test_the_order_of_the_list_does_not_matter() -> None:
    assert _merge([1512, 1000, 1256], [5512, 5000, 5256], [3, 256, 256]) == [[1000, 5000, 515]]


def test_ranges_that_stand_in_another_order_there_stay_apart() -> None:
    assert _merge([1000, 1256], [5256, 5000], [256, 256]) == [[1000, 5256, 256], [1256, 5000, 256]]


def test_bytes_between_two_ranges_are_overwritten_only_if_they_are_padding() -> None:
    assert len(_merge([1000, 1256], [5000, 5256], [100, 100], padding=[0, 156])) == 2
    assert len(_merge([1000, 1256], [5000, 5256], [100, 100], padding=[156, 0])) == 1
    assert len(_merge([1000, 1256], [5000, 5256], [256, 100], padding=[0, 156])) == 1
    assert len(_merge([1024, 1536], [5120, 5632], [100, 100], padding=[156, 156])) == 2, "a small weight between them"
    assert len(_merge([1000, 2000], [5000, 6000], [100, 100])) == 2


@pytest.mark.parametrize("side", ["here", "there"])
def test_no_read_crosses_from_one_region_into_the_next(side: str) -> None:
    assert len(_merge([1000, 1256], [5000, 5256], [256, 256], **{side: [0, 1]})) == 2


def test_every_byte_is_read_once_whatever_the_layout() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        count = int(rng.integers(1, 40))
        sizes = rng.integers(1, 900, count)
        room = -(-sizes // 256) * 256 + 4096 * rng.integers(0, 2, count)
        local = np.cumsum(room) - room
        remote = local + rng.choice([10**6, 10**6, 10**6, 2 * 10**6], count)
        memory = {}
        for here, there, nbytes in _merge(local.tolist(), remote.tolist(), sizes.tolist()):
            for offset in range(nbytes):
                assert here + offset not in memory
                memory[here + offset] = there + offset
        for here, there, nbytes in zip(local.tolist(), remote.tolist(), sizes.tolist(), strict=True):
            assert all(memory[here + offset] == there + offset for offset in range(nbytes))


def test_an_address_outside_the_regions_is_refused() -> None:
    regions = Regions.of([(5000, 100), (1000, 100)])
    assert regions.index(np.array([1000, 5099, 5000]), np.array([100, 1, 100])).tolist() == [0, 1, 1]
    for address, nbytes in ((999, 1), (1090, 11), (5100, 1), (2000, 1)):
        with pytest.raises(ManifestMismatchError, match="beyond its regions"):
            regions.index(np.array([address]), np.array([nbytes]))
    with pytest.raises(ManifestMismatchError):
        Regions.of([]).index(np.array([1000]), np.array([1]))
