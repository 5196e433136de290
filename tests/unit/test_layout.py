"""Layouts: who holds what, put together from all ranks, sent as JSON, and refused by name where it cannot be right."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from support.layouts import World, worlds
from weight_transfer import ParamMeta
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import NONE, Layout, Regions
from weight_transfer.plan.merging import merged_manifest

COUNTED = settings(max_examples=60, deadline=None, derandomize=True)

X = ParamMeta("x", "bfloat16", (4, 6))
Y = ParamMeta("y", "float32", (8,))
MODEL = Manifest([X, Y])
Held = dict[str, list[Region]]


def rows(start: int, stop: int) -> Region:
    return Region((start, 0), (stop - start, 6))


def layout_of(*ranks: Held, manifest: Manifest = MODEL) -> Layout:
    return Layout.of([Regions.of(manifest, held, ("host", str(rank))) for rank, held in enumerate(ranks)])


def refused(sentence: str) -> Any:
    return pytest.raises(ManifestMismatchError, match=re.escape(sentence))


# What a layout says.


@given(worlds())
@COUNTED
def test_shards_are_each_ranks_regions_in_order_of_parameters(world: World) -> None:
    layout = world.layout()
    for rank, held in enumerate(world.held):
        expected = [
            (index, region) for index, param in enumerate(world.manifest.params) for region in held.get(param.name, [])
        ]
        assert layout.shards(rank) == expected
    assert layout.places == tuple(world.rank_places)


@given(worlds())
@COUNTED
def test_a_parameter_goes_by_region_if_a_rank_holds_some_of_it(world: World) -> None:
    layout = world.layout()
    by_region = [param for param in world.manifest.params if any(held.get(param.name) for held in world.held)]
    assert list(layout.by_region.params) == by_region
    assert {*layout.by_region.params} | {*layout.whole.params} == {*world.manifest.params}


@given(worlds())
@COUNTED
def test_the_wire_brings_the_same_layout_and_the_same_regions(world: World) -> None:
    layout, kept = world.layout(), world.needs()
    arrived = Layout.from_wire(json.loads(json.dumps(layout.to_wire())), world.manifest)
    assert arrived.digest == layout.digest == world.layout().digest and arrived.places == layout.places
    assert all(arrived.shards(rank) == layout.shards(rank) for rank in range(len(world.held)))
    again = Regions.from_wire(json.loads(json.dumps(kept.to_wire())), world.manifest)
    assert again.digest == kept.digest and again.place == kept.place and again.nbytes == kept.nbytes
    for index, param in enumerate(world.manifest.params):
        assert again.of_param(index) == kept.of_param(index) == world.kept.get(param.name)


@given(worlds())
@COUNTED
def test_regions_know_their_number_and_bytes(world: World) -> None:
    kept = world.needs()
    assert kept.counts.tolist() == [len(world.kept.get(param.name, [])) for param in world.manifest.params]
    assert kept.nbytes == sum(4 * region.volume for regions in world.kept.values() for region in regions)


def test_parameters_that_are_cut_alike_share_a_pattern() -> None:
    model = Manifest(ParamMeta(f"p{index}", "int8", (4, 6)) for index in range(50))
    layout = layout_of(
        *({param.name: [part] for param in model.params} for part in (rows(0, 2), rows(2, 4))), manifest=model
    )
    assert len(layout.patterns) == 1 and not layout.pattern_of.any()


def test_a_part_of_a_layout_goes_whole_after_all() -> None:
    layout = layout_of({"x": [rows(0, 4)], "y": [Region.whole((8,))]}).without([0])
    assert layout.whole.params == (X,) and layout.by_region.params == (Y,)
    assert layout.shards(0) == [(1, Region.whole((8,)))]
    assert Layout.from_wire(layout.to_wire(), MODEL).digest == layout.digest


def test_further_names_stay_with_their_weights() -> None:
    tied = Manifest([X, Y], {"z": "x"}, partial=True)
    layout = layout_of({"x": [rows(0, 4)]}, manifest=tied)
    assert layout.by_region == Manifest([X], {"z": "x"}, partial=True)
    assert layout.whole == Manifest([Y], partial=True)


def test_a_model_without_parameters_has_a_layout() -> None:
    layout = layout_of({}, {}, manifest=Manifest([]))
    assert layout.shards(0) == [] and Layout.from_wire(layout.to_wire(), Manifest([])).digest == layout.digest


# Refusals.


def test_a_gap_is_refused_by_name() -> None:
    with refused("hold 18 of the 24 elements of x: bfloat16 [4, 6]"):
        layout_of({"x": [rows(0, 2)]}, {"x": [rows(3, 4)]})


def test_a_partial_overlap_is_refused_by_name() -> None:
    with refused("ranks 0 and 1 have [0:3, 0:6] and [2:4, 0:6] of x: bfloat16 [4, 6], which overlap"):
        layout_of({"x": [rows(0, 3)]}, {"x": [rows(2, 4)]})


def test_an_overlap_is_refused_though_the_number_of_elements_is_right() -> None:
    with refused("ranks 0 and 1 have [0:4] and [2:6] of y: float32 [8], which overlap"):
        layout_of({"y": [Region((0,), (4,))]}, {"y": [Region((2,), (4,))]})


def test_replicas_and_empty_shards_are_no_overlap() -> None:
    held = {"x": [rows(0, 4), rows(2, 2)]}
    assert layout_of(held, held).shards(1) == [(0, rows(0, 4)), (0, rows(2, 2))]


@pytest.mark.parametrize("region", [rows(3, 5), Region((0, 0), (4, 7)), Region((0,), (4,)), Region((), ())])
def test_a_region_beyond_its_parameter_is_refused_by_name(region: Region) -> None:
    with refused(f"Region {region} does not lie within x: bfloat16 [4, 6]."):
        Regions.of(MODEL, {"x": [region]})
    wire = {"patterns": [[[*region.offset, *region.shape]]], "pattern_of": [0, NONE], "place": []}
    with refused(f"Region {region} does not lie within x: bfloat16 [4, 6]."):
        Regions.from_wire(wire, MODEL)


def test_regions_of_an_unknown_parameter_are_refused_by_name() -> None:
    with refused("Regions were given of 'w', which is not among the weights."):
        Regions.of(MODEL, {"x": [], "w": []})


WHOLE = [[[0, 0, 0, 4, 6]], [[0, 0, 8]]]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ([[[0, 0, 0, 4, 6]], [[0, 0, 0, 8, 1]]], "Trainer rank 0 has a shard of 2 dimensions of y: float32 [8]"),
        ([[[0, 0, 0, 4]], [[0, 0, 8]]], "Trainer rank 0 has a shard of 1.5 dimensions of x"),
        (
            [[[0, 0, 0, 5, 6]], [[0, 0, 8]]],
            "rank 0 has [5, 6] from [0, 0] on of x: bfloat16 [4, 6], which lies beyond it",
        ),
        ([[[0, -1, 0, 4, 6]], [[0, 0, 8]]], "rank 0 has [4, 6] from [-1, 0] on of x"),
        ([[[0, 0, 0, -4, -6]], [[0, 0, 8]]], "rank 0 has [-4, -6] from [0, 0] on of x"),
        ([WHOLE[0], [[0, 0, 8], [0, 2**63 - 1, 2]]], "rank 0 has [2] from [9223372036854775807] on of y"),
        ([WHOLE[0], [[0, 0, 4]]], "hold 4 of the 8 elements of y"),
        ([WHOLE[0], [[2, 0, 8]]], "A layout of 2 trainer ranks came that speaks of ranks 2 to 2."),
        ([WHOLE[0], [[-1, 0, 8]]], "A layout of 2 trainer ranks came that speaks of ranks -1 to -1."),
        ([WHOLE[0], [[1, 0, 4], [0, 4, 4]]], "are not in the order of ranks"),
        ([WHOLE[0], []], "shards are missing"),
        ([WHOLE[0]], "A layout came with pattern 1 of 1 for y: float32 [8]."),
        ([WHOLE[0], [[0, 0, 8], [0, 0]]], "in a form"),
        ([WHOLE[0], [[0, 0, 8.5]]], "in a form"),
        ([WHOLE[0], [["0", "0", "8"]]], "in a form"),
        ([WHOLE[0], [0, 0, 8]], "in a form"),
        ([WHOLE[0], [[]]], "in a form"),
        ([WHOLE[0], [[[0, 0, 8]]]], "in a form"),
        ([WHOLE[0], [[0, 0, 2**64]]], "in a form"),
        ([WHOLE[0], [[0, 0, None]]], "in a form"),
        ([WHOLE[0], "008"], "in a form"),
        (7, "in a form"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(patterns: Any, sentence: str) -> None:
    wire = {"patterns": WHOLE, "pattern_of": [0, 1], "places": [[], ["host"]]}
    assert Layout.from_wire(wire, MODEL).shards(0) == [(0, Region.whole((4, 6))), (1, Region.whole((8,)))]
    with refused(sentence):
        Layout.from_wire(wire | {"patterns": patterns}, MODEL)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("pattern_of", [0], "came for 1 weights, where the manifest has 2"),
        ("pattern_of", [0, 2], "came with pattern 2 of 2 for y: float32 [8]"),
        ("pattern_of", [-2, 1], "came with pattern -2 of 2 for x: bfloat16 [4, 6]"),
        ("pattern_of", [0, 1.0], "in a form"),
        ("pattern_of", [[0, 1]], "in a form"),
        ("pattern_of", [True, False], "in a form"),
        ("pattern_of", None, "in a form"),
        ("place", "host", "in a form"),
        ("place", [3], "in a form"),
    ],
)
def test_columns_that_do_not_fit_are_refused(key: str, value: Any, sentence: str) -> None:
    regions = {"patterns": [[[0, 0, 4, 6]], [[0, 8]]], "pattern_of": [0, 1], "place": ["host"]}
    assert Regions.from_wire(regions, MODEL).nbytes == MODEL.nbytes
    with refused(sentence):
        Regions.from_wire(regions | {key: value}, MODEL)
    layout = {"patterns": WHOLE, "pattern_of": [0, 1], "places": [["host"]]}
    with refused(sentence):
        Layout.from_wire(layout | ({"places": [value]} if key == "place" else {key: value}), MODEL)


@pytest.mark.parametrize(
    "patterns", [[[[0, 8, 1]]], [[[0, -1]]], [[["0", "8"]]], [[[0, 8.0]]], [[0, 8]], [[[False, 8]]], 3]
)
def test_patterns_that_are_no_regions_are_refused(patterns: Any) -> None:
    with refused("Regions came in a form that this version does not know."):
        Regions.from_wire({"patterns": patterns, "pattern_of": [NONE, 0], "place": []}, MODEL)


@pytest.mark.parametrize("from_wire", [Regions.from_wire, Layout.from_wire])
@pytest.mark.parametrize("data", [None, [], {}, "text"])
def test_other_data_is_refused(from_wire: Callable[[Any, Manifest], Any], data: Any) -> None:
    with refused("in a form that this version does not know"):
        from_wire(data, MODEL)


# Ranks that list only what they have.


def test_manifests_that_are_alike_are_one() -> None:
    copies = [MODEL, copy.copy(MODEL), Manifest([X, Y])]
    assert merged_manifest(copies) is MODEL


def test_manifests_are_merged_in_order_of_first_appearance() -> None:
    z = ParamMeta("z", "int8", (2,))
    merged = merged_manifest([Manifest([Y]), Manifest([X, Y], {"tied": "x"}), Manifest([Y]), Manifest([z, X])])
    assert merged == Manifest([Y, X, z], {"tied": "x"})


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            Manifest([ParamMeta("x", "bfloat16", (4, 3))]),
            "Trainer rank 2 has 'x': bfloat16 [4, 3], rank 0 bfloat16 [4, 6]; all ranks must have the same model.",
        ),
        (Manifest([ParamMeta("y", "float16", (8,))]), "Trainer rank 2 has 'y': float16 [8], rank 1 float32 [8]"),
        (Manifest([X, Y], {"z": "y"}), "Trainer rank 2 has 'z' as a further name of 'y', rank 0 a further name of 'x'"),
        (Manifest([X], {"y": "x"}), "Trainer rank 2 has 'y' as a further name of 'x', rank 1 a weight of its own"),
        (Manifest([X], partial=True), "Trainer rank 2 sends some of the weights, rank 0 all weights"),
    ],
)
def test_ranks_that_disagree_are_named(other: Manifest, sentence: str) -> None:
    with refused(sentence):
        merged_manifest([Manifest([X], {"z": "x"}), Manifest([Y]), other])


def test_a_layout_is_put_together_from_ranks_that_list_different_weights() -> None:
    stages = [Manifest([X]), Manifest([X]), Manifest([Y])]
    held: list[Held] = [{"x": [rows(0, 2)]}, {"x": [rows(2, 4)]}, {"y": [Region.whole((8,))]}]
    layout = Layout.of([Regions.of(own, regions) for own, regions in zip(stages, held, strict=True)])
    assert layout.manifest == MODEL
    assert [layout.shards(rank) for rank in range(3)] == [
        [(0, rows(0, 2))],
        [(0, rows(2, 4))],
        [(1, Region.whole((8,)))],
    ]
    assert layout.digest == layout_of(*held).digest or layout.places != layout_of(*held).places


def test_a_weight_that_no_rank_has_a_region_of_goes_whole() -> None:
    layout = Layout.of([Regions.of(Manifest([X]), {}), Regions.of(Manifest([Y]), {"y": [Region.whole((8,))]})])
    assert layout.whole.params == (X,) and layout.pattern_of.tolist() == [NONE, 0]


def test_of_weights_that_a_rank_does_not_list_it_has_nothing() -> None:
    own = Regions.of(Manifest([X]), {})
    merged = own.in_manifest(MODEL)
    assert merged.of_param(0) is None and merged.of_param(1) == [] and merged.nbytes == 0
    assert own.in_manifest(own.manifest) is own
    again = Regions.of(Manifest([Y]), {"y": []}).in_manifest(MODEL)
    assert again.patterns == ((),) and again.pattern_of.tolist() == [0, 0]


@pytest.mark.parametrize("other", [Manifest([Y]), Manifest([ParamMeta("x", "float32", (4, 6)), Y])])
def test_regions_of_weights_that_the_manifest_lacks_are_refused_by_name(other: Manifest) -> None:
    with refused("Regions were given of x: bfloat16 [4, 6], which is not among the weights."):
        Regions.of(Manifest([X]), {"x": [rows(0, 4)]}).in_manifest(other)


def test_a_digest_tells_layouts_apart() -> None:
    one = layout_of({"y": [Region((0,), (4,))]}, {"y": [Region((4,), (4,))]})
    other = layout_of({"y": [Region((4,), (4,))]}, {"y": [Region((0,), (4,))]})
    assert one.digest != other.digest and np.array_equal(one.pattern_of, other.pattern_of)
