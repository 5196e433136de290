"""What a rank holds of a weight that is cut along the dimensions of a mesh, against a plain reference of indices."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weight_transfer import ModuleSource
from weight_transfer.model.cuts import Cut, blocks_of, is_one_order
from weight_transfer.model.sharding import LocalShards, shards_of

CUTS = st.integers(1, 4).flatmap(
    lambda parts: st.builds(
        Cut, dim=st.integers(0, 1), parts=st.just(parts), index=st.integers(0, parts - 1), strips=st.integers(1, 4)
    )
)


def chunks(array: np.ndarray, count: int, axis: int) -> list[np.ndarray]:
    """Return what `torch.chunk` gives, filled up with empty ones."""
    size = -(-array.shape[axis] // count)
    return [array.take(range(*slice(i * size, (i + 1) * size).indices(array.shape[axis])), axis) for i in range(count)]


@given(shape=st.tuples(st.integers(0, 13), st.integers(0, 7)), cuts=st.lists(CUTS, max_size=4))
def test_blocks_are_those_of_plain_cuts(shape: tuple[int, int], cuts: list[Cut]) -> None:
    full = np.arange(shape[0] * shape[1]).reshape(shape)
    left = full
    for cut in cuts:
        strips = chunks(left, cut.strips, cut.dim)
        left = np.concatenate([chunks(strip, cut.parts, cut.dim)[cut.index] for strip in strips], cut.dim)
    own, blocks = blocks_of(shape, cuts)
    assert own == left.shape
    seen = np.zeros(own, dtype=int)
    for region, within in blocks:
        assert region.volume
        assert (full[region.slices] == left[within.slices]).all()
        seen[within.slices] += 1
    assert (seen == 1).all()


def test_neighbours_are_one_block() -> None:
    """The rank that has the end of one strip and the beginning of the next has them in one piece."""
    _, blocks = blocks_of([8], [Cut(0, parts=1, index=0, strips=4)])
    assert [str(region) for region, _ in blocks] == ["[0:8]"]


@given(parts=st.lists(st.integers(1, 4), min_size=2, max_size=3), size=st.integers(0, 40), data=st.data())
def test_strips_stand_for_an_order_of_cuts_unless_that_is_doubtful(
    parts: list[int], size: int, data: st.DataObject
) -> None:
    """As many strips as the cuts have parts that are made before, and come later in the mesh."""
    order = data.draw(st.permutations(range(len(parts))))
    strips = [
        math.prod(parts[other] for other in order[: order.index(number)] if other > number)
        for number in range(len(parts))
    ]
    own = [data.draw(st.integers(0, count - 1)) for count in parts]
    stripped = [Cut(0, parts[number], own[number], strips[number]) for number in range(len(parts))]
    ordered = [Cut(0, parts[number], own[number]) for number in order]
    certain = is_one_order(size, tuple(zip(parts, strips, strict=True)))
    if certain:
        assert blocks_of([size], stripped) == blocks_of([size], ordered)
    assert certain or size % math.prod(parts)


def test_an_order_is_in_doubt_if_tensor_parallelism_has_cut_unevenly() -> None:
    """Nine rows over two and then four ranks: the last row is the first tensor-parallel rank's, or the second's."""
    assert not is_one_order(9, ((4, 2), (2, 1)))
    assert is_one_order(10, ((4, 2), (2, 1)))
    assert is_one_order(9, ((4, 1), (2, 1)))
    assert is_one_order(9, ((4, 3), (2, 1)))  # strips that stand for no order


def test_a_scalar_has_one_block() -> None:
    assert blocks_of([], [])[0] == ()
    assert [str(region) for region, _ in blocks_of([], [])[1]] == ["[]"]


def test_a_plain_tensor_is_no_shard_and_torch_distributed_is_not_imported_to_see_that() -> None:
    assert shards_of(torch.ones(2)) is None
    code = (
        "import sys, torch, weight_transfer as wt; source = wt.ModuleSource(torch.nn.Linear(2, 2)); source.manifest();"
        "assert len(source.shards()) == 2; assert 'torch.distributed.tensor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_resident_is_one_shard_that_all_ranks_have() -> None:
    module = nn.Linear(3, 2)
    source = ModuleSource(module)
    source.manifest()
    shards = source.shards()
    assert list(shards) == ["weight", "bias"]
    ((shard,), (bias,)) = shards.values()
    assert shard.tensor is module.weight
    assert bias.tensor is module.bias
    assert shard.common
    assert str(shard.region) == "[0:2, 0:3]"


def test_shards_are_the_same_object_until_a_weight_is_another_one() -> None:
    module = nn.Linear(3, 2)
    source = ModuleSource(module)
    source.manifest()
    first = source.shards()
    with torch.no_grad():
        module.weight.mul_(2)
    source.manifest()
    assert source.shards() is first
    module.weight = nn.Parameter(torch.ones(2, 3))
    source.manifest()
    assert source.shards() is not first
    assert source.shards()["weight"][0].tensor is module.weight


def test_what_only_iteration_can_give_is_absent() -> None:
    class Unknown(nn.Parameter):
        """Of a type that nobody here has heard of."""

        def full_tensor(self) -> torch.Tensor:
            return self.detach()

    module = nn.Linear(3, 2)
    module.weight = Unknown(module.weight.detach().clone())
    module.register_buffer("turned", torch.ones(2, dtype=torch.complex64).conj())
    source = ModuleSource(module)
    source.manifest()
    assert list(source.shards()) == ["bias"]


def test_weights_that_do_not_change_cost_no_new_shards() -> None:
    shards = LocalShards()
    weights = {"a": torch.ones(2)}
    assert shards.of(weights, weights) is shards.of(weights, weights)
    assert shards.of(weights, {}) == {}


class Anew(ModuleSource):
    """Yields something else than the module's own weights."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor / 2) for name, tensor in super().__iter__())


def test_a_subclass_that_iterates_anew_has_no_shards() -> None:
    source = Anew(nn.Linear(2, 2))
    source.manifest()
    assert not source.shards()
    assert source.shards() is source.shards()
