"""What each rank of a trainer holds: four ranks, started once, cut weights over meshes of several shapes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from support.actors import Actor
from weight_transfer.errors import WeightTransferError
from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import NONE, Layout, Regions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Actor]]:
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    with ExitStack() as stack:
        started = [Actor("sharded_trainer", rank=rank, world_size=4, store=store) for rank in range(4)]
        for rank in started:
            stack.callback(rank.stop)
        yield [rank.ready() for rank in started]


def ask(ranks: list[Actor], command: str, **arguments: Any) -> list[Any]:
    for rank in ranks:
        rank.tell(command, **arguments)
    replies, errors = [], []
    for rank in ranks:
        try:
            replies.append(rank.reply())
        except WeightTransferError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return replies


def layout_of(held: list[Mapping[str, Any]], shapes: Mapping[str, list[int]]) -> Layout:
    manifest = Manifest(ParamMeta(name, "float32", shapes[name]) for name in held[0])
    own = [
        {name: [Region(*region) for region in some] for name, some in rank.items() if some is not None} for rank in held
    ]
    return Layout.of([Regions.of(manifest, regions) for regions in own])


LINE, PAIR, SQUARE, CUBE = [0, 1, 2, 3], [0, 1], [[0, 1], [2, 3]], [[[0], [1]], [[2], [3]]]


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ([8, 3], LINE, ["S0"]),
        ([7, 3], LINE, ["S0"]),
        ([5, 3], LINE, ["S0"]),
        ([2, 3], LINE, ["S0"]),
        ([3, 9], LINE, ["S1"]),
        ([3, 2, 5], LINE, ["S2"]),
        ([6, 4], LINE, ["R"]),
        ([], LINE, ["R"]),
        ([5], PAIR, ["S0"]),
        ([3, 5], [1, 3], ["S1"]),
        ([4, 3], PAIR, ["R"]),
        ([7, 5], SQUARE, ["S0", "S1"]),
        ([7, 5], SQUARE, ["S1", "S0"]),
        ([8, 2], SQUARE, ["S0", "S0"]),
        ([7, 2], SQUARE, ["S0", "S0"]),
        ([3, 2], SQUARE, ["S0", "S0"]),
        ([8, 2], SQUARE, ["S0/2", "S0"]),
        ([7, 2], SQUARE, ["S0/2", "S0"]),
        ([5, 2], SQUARE, ["S0/2", "S0"]),
        ([2, 9], SQUARE, ["S1/2", "S1"]),
        ([12, 2], LINE, ["S0/3"]),
        ([11, 2], PAIR, ["S0/3"]),
        ([6, 8], SQUARE, ["S0/3", "S1/2"]),
        ([7, 5], SQUARE, ["R", "S0"]),
        ([7, 5], SQUARE, ["S1", "R"]),
        ([7, 5], [[2, 3], [0, 1]], ["R", "S1"]),
        ([7, 5, 3], CUBE, ["S0", "S0", "S2"]),
        ([7, 5, 3], CUBE, ["S1", "R", "S0"]),
    ],
    ids=str,
)
def test_what_the_ranks_hold_is_what_is_gathered(
    ranks: list[Actor], shape: list[int], mesh: list[Any], placements: list[str]
) -> None:
    held = ask(ranks, "place", shape=shape, mesh=mesh, placements=placements)
    layout = layout_of(held, {"weight": shape, "scale": [3]})
    assert NONE not in layout.pattern_of
    inside = {rank for rank in range(4) if str(rank) in str(mesh)}
    assert all((not rank["weight"]) or number in inside for number, rank in enumerate(held))
    assert all(rank["scale"] == [[[0], [3]]] for rank in held)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
@pytest.mark.parametrize("shape", [[8, 2], [7, 2], [3, 2]], ids=str)
def test_shards_of_one_dimension_may_be_cut_in_either_order(
    ranks: list[Actor], shape: list[int], order: list[int]
) -> None:
    pytest.importorskip("torch.distributed.tensor._dtensor_spec", reason="this torch knows no order")
    held = ask(ranks, "place", shape=shape, mesh=SQUARE, placements=["S0", "S0"], order=order)
    assert NONE not in layout_of(held, {"weight": shape, "scale": [3]}).pattern_of


@pytest.mark.parametrize("placements", [["P", "R"], ["S0", "P"]], ids=str)
def test_a_sum_that_is_still_to_be_made_is_gathered(ranks: list[Actor], placements: list[str]) -> None:
    held = ask(ranks, "place", shape=[4, 3], mesh=SQUARE, placements=placements)
    assert all(rank["weight"] is None for rank in held)


@pytest.mark.parametrize("sizes", [[4, 8, 4], [5, 7, 3], [3, 2, 5]], ids=str)
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "fsdp x tp"])
def test_a_wrapped_model_holds_the_same_before_and_after_a_forward_pass(
    ranks: list[Actor], kind: str, sizes: list[int]
) -> None:
    if kind == "fsdp x tp" and any(size % 2 for size in sizes):
        sizes = [size * 2 for size in sizes]
    first, second, third = sizes
    held = ask(ranks, "wrap", kind=kind, sizes=sizes)
    layout = layout_of(held, {"0.weight": [second, first], "0.bias": [second], "1.weight": [third, second]})
    assert NONE not in layout.pattern_of


@pytest.mark.parametrize("how", ["root", "all", "unshard", "child"])
def test_a_copy_that_fsdp_left_unsharded_is_never_read(ranks: list[Actor], how: str) -> None:
    assert ask(ranks, "stale", how=how) == [{"looks": 0}] * 4


def test_a_module_is_not_read_in_the_middle_of_its_forward_pass(ranks: list[Actor]) -> None:
    (refusal,) = set(ask(ranks, "midway"))
    assert refusal.startswith(
        "FSDP2 holds the parameters of 'FSDPChild' unsharded, because its forward pass is not over"
    )
