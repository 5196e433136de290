"""The plan of broadcasts: complete, deterministic, and the same on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer import Manifest, ParamMeta
from weight_transfer_nccl.plan import Batch, Layout, make_plan

if TYPE_CHECKING:
    import pytest

manifests = st.lists(st.integers(0, 5000), min_size=1, max_size=40).map(
    lambda sizes: Manifest(tuple(ParamMeta(f"p{index}", "uint8", (size,)) for index, size in enumerate(sizes)))
)
layouts = st.builds(
    Layout,
    bucket_bytes=st.integers(256, 4096),
    buckets=st.integers(2, 4),
    direct_bytes=st.integers(1, 8192),
)


def travelled(manifest: Manifest, batches: Sequence[Batch]) -> bool:
    """Whether every byte travels once, in order."""
    parts: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(manifest.params))}
    for batch in batches:
        assert batch.nbytes == sum(slot.nbytes for slot in (*batch.packed, *batch.direct))
        assert batch.packed_bytes == max((slot.offset + slot.nbytes for slot in batch.packed), default=0)
        end = 0
        for slot in (*batch.packed, *batch.direct):
            assert slot.offset >= end
            end = slot.offset + slot.nbytes
            parts[slot.param].append((slot.start, slot.nbytes))
    for index, param in enumerate(manifest.params):
        position = 0
        for start, nbytes in parts[index]:
            assert start == position
            position += nbytes
        assert position == param.nbytes
    return all(parts.values())


@given(manifests, layouts)
def test_every_byte_travels_once_and_no_batch_exceeds_a_bucket(manifest: Manifest, layout: Layout) -> None:
    plan = make_plan(manifest, layout)
    assert travelled(manifest, plan.batches)
    assert all(batch.bucket_bytes <= layout.bucket_bytes for batch in plan.batches)


@given(manifests, layouts)
def test_what_is_packed_for_a_long_launch_fits_in_a_bucket_and_the_rest_in_four(
    manifest: Manifest, layout: Layout
) -> None:
    plan = make_plan(manifest, layout)
    assert travelled(manifest, plan.long)
    assert len(plan.long) <= len(plan.batches)
    for batch in plan.long:
        assert batch.packed_bytes <= layout.bucket_bytes
        assert sum(slot.nbytes for slot in batch.direct) <= 4 * layout.bucket_bytes


@given(manifests, layouts)
def test_both_sides_derive_the_same_plan(manifest: Manifest, layout: Layout) -> None:
    again = Manifest.from_wire(manifest.to_wire())
    assert make_plan(manifest, layout).batches == make_plan(again, layout).batches
    assert make_plan(manifest, layout).digest == make_plan(again, layout).digest


@given(manifests, layouts)
def test_another_layout_has_another_digest(manifest: Manifest, layout: Layout) -> None:
    other = attrs.evolve(layout, bucket_bytes=layout.bucket_bytes + 1)
    assert make_plan(manifest, layout).digest != make_plan(manifest, other).digest


def test_another_length_of_launches_has_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, layout = Manifest([ParamMeta("p", "uint8", (5000,))]), Layout(2048, 2, 1000)
    before = make_plan(manifest, layout).digest
    monkeypatch.setattr("weight_transfer_nccl.plan._LONG", 5)
    assert make_plan(manifest, layout).digest != before


def test_what_is_empty_is_packed_however_small_large_ones_are() -> None:
    manifest = Manifest([ParamMeta("p", "uint8", (0,)), ParamMeta("q", "uint8", (1,))])
    (batch,) = make_plan(manifest, Layout(bucket_bytes=2048, buckets=2, direct_bytes=0)).batches
    assert [slot.param for slot in batch.packed] == [0]
    assert [slot.param for slot in batch.direct] == [1]


def test_small_tensors_are_packed_and_large_ones_fill_the_batches() -> None:
    manifest = Manifest(tuple(ParamMeta(f"p{i}", "uint8", (size,)) for i, size in enumerate((10, 5000, 20, 30))))
    plan = make_plan(manifest, Layout(bucket_bytes=2048, buckets=2, direct_bytes=1000))
    assert [([s.param for s in b.packed], [(s.param, s.start) for s in b.direct]) for b in plan.batches] == [
        ([0], []),
        ([], [(1, 0)]),
        ([], [(1, 2048)]),
        ([2, 3], [(1, 4096)]),
    ]
