"""Boxes: strided copies by address put every byte of a piece where it belongs, with few and long runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.layouts import UNTOUCHED, World, boxes_between, copy_boxes, strided, worlds
from weight_transfer import ParamMeta
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.regions import Region
from weight_transfer.plan.boxes import Tensors
from weight_transfer.plan.layout import NONE, Layout, Regions
from weight_transfer.plan.pieces import plan_pieces

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Boxes

COUNTED = settings(max_examples=150, deadline=None, derandomize=True)


@given(worlds(), st.integers(0, 5))
@COUNTED
def test_copies_put_each_element_in_its_place(world: World, worker: int) -> None:
    layout, targets = world.layout(), world.targets()
    pieces = plan_pieces(layout, world.needs(), worker)
    for rank in range(len(world.held)):
        mine, shards = pieces.of_rank(rank), world.shards(layout, rank)
        boxes = boxes_between(mine, shards, [target for *_, target in targets])
        sizes = np.bincount(boxes.piece, weights=boxes.sizes, minlength=len(mine))
        assert sizes.tolist() == mine.sizes.tolist(), "a byte is moved twice, or not at all"
        assert (boxes.run > 0).all() and (boxes.count > 0).all() and (np.diff(boxes.piece) >= 0).all()
        copy_boxes(boxes)
    for param, region, target in targets:
        goes_whole = layout.pattern_of[param] == NONE
        assert (target == UNTOUCHED).all() if goes_whole else (target == world.full(param)[region.slices]).all()


@given(st.lists(st.integers(1, 5), max_size=5).map(tuple), st.integers(0, 999))
@COUNTED
def test_a_weight_is_copied_between_any_strides(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = strided(rng.integers(0, 1 << 30, size=shape, dtype=np.int32), rng)
    target = strided(np.full(shape, UNTOUCHED, dtype=np.int32), rng)
    copy_boxes(boxes_of_whole(source, target))
    assert (target == source).all()


def boxes_of_whole(source: np.ndarray, target: np.ndarray) -> Boxes:
    """Return the boxes that copy one array into another, as those of a worker that keeps all of one rank's weight."""
    model = Manifest([ParamMeta("x", "int32", source.shape)])
    whole = Regions.of(model, {"x": [Region.whole(source.shape)]})
    return boxes_between(plan_pieces(Layout.of([whole]), whole), [source], [target])


def table(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.int32)


@pytest.mark.parametrize(
    ("source", "target", "boxes", "count", "run"),
    [
        (table(4, 5, 6), table(4, 5, 6), 1, 1, 480),
        (table(), table(), 1, 1, 4),
        (table(4, 8)[:, :6], table(4, 6), 1, 4, 24),
        (table(4, 6), table(6, 4).T, 4, 6, 4),
        (table(100, 3), table(3, 100).T, 3, 100, 4),
        (table(4, 5, 8)[:, :, :6], table(4, 5, 6), 1, 20, 24),
        (table(4, 7, 6)[:, :5], table(4, 5, 6), 1, 4, 120),
        (table(9, 7, 8)[:, :5, :6], table(9, 5, 6), 5, 9, 24),
        (table(1, 6, 1), table(6)[None, :, None], 1, 1, 24),
    ],
)
def test_runs_are_joined_where_both_sides_continue(
    source: np.ndarray, target: np.ndarray, boxes: int, count: int, run: int
) -> None:
    found = boxes_of_whole(source, target)
    assert (len(found), set(found.count.tolist()), set(found.run.tolist())) == (boxes, {count}, {run})


def test_a_single_run_has_no_steps() -> None:
    found = boxes_of_whole(table(4, 6), table(4, 6))
    assert found.source_step.tolist() == found.target_step.tolist() == [0]


def test_no_pieces_have_no_boxes() -> None:
    found = boxes_of_whole(table(3, 0), table(3, 0))
    assert len(found) == 0 and found.sizes.tolist() == []


def test_boxes_can_be_chosen() -> None:
    found = boxes_of_whole(table(100, 3), table(3, 100).T)
    assert found.where(np.array([2])).source.tolist() == found.source[2:].tolist()
    assert len(found.where(found.run > 4)) == 0


def test_tensors_have_room_for_more_dimensions() -> None:
    tensors = Tensors.of([100, 200], [[6, 1], []], 3)
    assert tensors.base.tolist() == [100, 200] and tensors.strides.tolist() == [[6, 1, 0], [0, 0, 0]]
