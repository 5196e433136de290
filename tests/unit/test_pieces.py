"""Pieces: each byte that a worker keeps comes once, from a rank that holds it, and both sides plan the same."""

from __future__ import annotations

import json
import re

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.layouts import UNTOUCHED, World, same_columns, worlds
from weight_transfer import ParamMeta
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import NONE, Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces

COUNTED = settings(max_examples=100, deadline=None, derandomize=True)
WORKERS = st.integers(0, 5)


def box(start: np.ndarray, shape: np.ndarray, dims: int) -> tuple[slice, ...]:
    return Region(start[:dims], shape[:dims]).slices


@given(worlds(), WORKERS)
@COUNTED
def test_every_element_arrives_once_and_right(world: World, worker: int) -> None:
    layout, targets = world.layout(), world.targets()
    pieces = plan_pieces(layout, world.needs(), worker)
    shards = [world.shards(layout, rank) for rank in range(len(world.held))]
    for index in range(len(pieces)):
        param, _, target = targets[pieces.target[index]]
        dims = target.ndim
        assert param == pieces.param[index] and pieces.itemsize[index] == 4
        source = shards[pieces.rank[index]][pieces.shard[index]]
        into = box(pieces.target_start[index], pieces.shape[index], dims)
        assert (target[into] == UNTOUCHED).all(), "an element arrives twice"
        target[into] = source[box(pieces.source_start[index], pieces.shape[index], dims)]
    for param, region, target in targets:
        goes_whole = layout.pattern_of[param] == NONE
        assert (target == UNTOUCHED).all() if goes_whole else (target == world.full(param)[region.slices]).all()


@given(worlds(), WORKERS)
@COUNTED
def test_pieces_have_the_bytes_that_are_kept(world: World, worker: int) -> None:
    layout = world.layout()
    pieces = plan_pieces(layout, world.needs(), worker)
    kept = [target.nbytes for param, _, target in world.targets() if layout.pattern_of[param] != NONE]
    assert pieces.nbytes == sum(kept) == sum(pieces.by_rank(len(world.held)).tolist())
    assert all(pieces.of_rank(rank).nbytes == size for rank, size in enumerate(pieces.by_rank(len(world.held))))
    assert (pieces.shape > 0).all() and (np.diff(pieces.param) >= 0).all()


@given(worlds(), WORKERS)
@COUNTED
def test_both_sides_plan_the_same_from_what_travels(world: World, worker: int) -> None:
    layout, kept = world.layout(), world.needs()
    manifest = Manifest.from_wire(json.loads(json.dumps(world.manifest.to_wire())))
    arrived = Layout.from_wire(json.loads(json.dumps(layout.to_wire())), manifest)
    said = Regions.from_wire(json.loads(json.dumps(kept.to_wire())), manifest)
    mine, theirs = plan_pieces(layout, said, worker), plan_pieces(arrived, kept, worker)
    assert same_columns(mine, theirs) and same_columns(mine, plan_pieces(layout, kept, worker))


@given(worlds(), WORKERS)
@COUNTED
def test_no_nearer_rank_has_the_same_region(world: World, worker: int) -> None:
    layout = world.layout()
    pieces = plan_pieces(layout, world.needs(), worker)

    def nearness(rank: int) -> int:
        there = layout.places[rank]
        return 2 if there == world.place else int(there[0] == world.place[0])

    for index in range(len(pieces)):
        param, region = layout.shards(pieces.rank[index])[pieces.shard[index]]
        replicas = [rank for rank in range(len(world.held)) if (param, region) in layout.shards(rank)]
        assert nearness(pieces.rank[index]) == max(map(nearness, replicas))


def replicated(params: int, ranks: int, rows: int = 16) -> tuple[Layout, Regions]:
    model = Manifest(ParamMeta(f"p{index}", "bfloat16", (rows,)) for index in range(params))
    whole = {param.name: [Region.whole(param.shape)] for param in model.params}
    return Layout.of([Regions.of(model, whole)] * ranks), Regions.of(model, whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_replicas_give_equal_shares_to_each_worker(ranks: int) -> None:
    layout, kept = replicated(240, ranks)
    assert set(plan_pieces(layout, kept, 3).by_rank(ranks).tolist()) == {240 * 32 // ranks}


def test_workers_begin_with_another_replica_each() -> None:
    layout, kept = replicated(1, 4)
    first, *others = [int(plan_pieces(layout, kept, worker).rank[0]) for worker in range(5)]
    assert sorted([first, *others[:3]]) == [0, 1, 2, 3] and others[3] == first


def test_shares_are_of_bytes_not_of_pieces() -> None:
    sizes = [1000, *[10] * 100]
    model = Manifest(ParamMeta(f"p{index}", "int8", (size,)) for index, size in enumerate(sizes))
    whole = Regions.of(model, {param.name: [Region.whole(param.shape)] for param in model.params})
    assert plan_pieces(Layout.of([whole, whole]), whole).by_rank(2).tolist() == [1000, 1000]


def test_a_worker_takes_what_lies_beside_it() -> None:
    model = Manifest([ParamMeta("x", "int8", (4,))])
    whole = {"x": [Region.whole((4,))]}
    layout = Layout.of([Regions.of(model, whole, (host, gpu)) for host in "ab" for gpu in "01"])
    taken = {
        place: plan_pieces(layout, Regions.of(model, whole, place)).rank.tolist() for place in (("b", "1"), ("a", "0"))
    }
    assert taken == {("b", "1"): [3], ("a", "0"): [0]}
    elsewhere = Regions.of(model, whole, ("b", "7"))
    assert {int(plan_pieces(layout, elsewhere, worker).rank[0]) for worker in range(2)} == {2, 3}


def test_no_parameters_have_no_pieces() -> None:
    layout, kept = replicated(0, 2)
    pieces = plan_pieces(layout, kept)
    assert len(pieces) == pieces.nbytes == 0 and pieces.by_rank(2).tolist() == [0, 0]
    assert not len(pieces.of_rank(1)) and {len(column) for column in attrs.astuple(pieces, recurse=False)} == {0}


def test_what_was_said_of_other_weights_is_refused() -> None:
    layout, _ = replicated(2, 1)
    _, kept = replicated(2, 1, rows=8)
    with pytest.raises(ManifestMismatchError, match="of other weights than those of the layout"):
        plan_pieces(layout, kept)


def test_another_number_of_dimensions_is_refused_by_name() -> None:
    layout, kept = replicated(2, 1)
    flat = attrs.evolve(kept, patterns=(((0, 0, 4, 4),),))
    with pytest.raises(ManifestMismatchError, match=re.escape("a region of 2 dimensions of p0: bfloat16 [16].")):
        plan_pieces(layout, flat)


def test_pieces_can_be_chosen() -> None:
    layout, kept = replicated(6, 2)
    pieces = plan_pieces(layout, kept)
    assert isinstance(pieces.where(np.array([1, 4])), Pieces)
    assert pieces.where(np.array([1, 4])).param.tolist() == [1, 4]
    assert pieces.where(pieces.rank == 1).param.tolist() == [3, 4, 5]
