"""A source for trainers with layouts of their own: what each rank has, said shard by shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.session.guarded import GuardedSource


def indices(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def rows_of(rank: int) -> list[tuple[Any, ...]]:
    """Return two of four rows of one weight, one block of columns and one of another, and a whole one."""
    a, b, norm = indices(4, 6), indices(3, 8), indices(5)
    return [
        ("a", (4, 6), (rank * 2, 0), a[rank * 2 : rank * 2 + 2]),
        ("b", (3, 8), (0, rank * 2), b[:, rank * 2 : rank * 2 + 2]),
        ("b", (3, 8), (0, 4 + rank * 2), b[:, 4 + rank * 2 : 6 + rank * 2]),
        ("norm", (5,), (0,), norm),
    ]


def test_ranks_hold_what_they_say_and_together_all_of_it() -> None:
    full = {"a": indices(4, 6), "b": indices(3, 8), "norm": indices(5)}
    held = []
    for rank in range(2):
        source = wt.ShardedSource(rows_of(rank))
        manifest = source.manifest()
        assert [str(param) for param in manifest.params] == [
            "a: float32 [4, 6]",
            "b: float32 [3, 8]",
            "norm: float32 [5]",
        ]
        for name, own in source.shards().items():
            for shard in own:
                assert torch.equal(full[name][shard.region.slices], shard.tensor)
                assert not shard.common
        regions = {name: [shard.region for shard in own] for name, own in source.shards().items()}
        held.append(Regions.of(manifest, regions))
    layout = Layout.of(held)
    assert len(layout.by_region.params) == 3
    assert not source.whole
    assert not source.collective
    assert source.device == "cpu"
    assert repr(source) == "ShardedSource(3 weights)"


def test_a_list_is_read_again_and_a_generator_is_kept() -> None:
    rows = rows_of(0)
    source = wt.ShardedSource(rows)
    manifest, shards = source.manifest(), source.shards()
    assert source.manifest() is manifest
    assert source.shards() is shards
    rows[0] = ("a", (4, 6), (2, 0), indices(2, 6))
    assert source.manifest() is manifest
    assert source.shards()["a"][0].region == Region((2, 0), (2, 6))
    rows.append(("c", (1,), (0,), indices(1)))
    assert [param.name for param in source.manifest().params] == ["a", "b", "norm", "c"]
    kept = wt.ShardedSource(row for row in rows)
    assert kept.manifest() == kept.manifest() == source.manifest()


def test_a_function_is_called_at_each_update_and_replaced_tensors_are_noticed() -> None:
    layer = nn.Linear(3, 2)
    source = wt.ShardedSource(lambda: ((name, it.shape, [0] * it.ndim, it) for name, it in layer.named_parameters()))
    manifest, shards = source.manifest(), source.shards()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert source.manifest() is manifest
    assert source.shards() is shards
    assert shards["weight"][0].tensor is layer.weight
    layer.weight.data = torch.ones(2, 3)
    source.manifest()
    assert source.shards() is not shards
    layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert source.manifest() is manifest
    assert source.shards()["weight"][0].tensor is layer.weight
    layer.bfloat16()
    assert source.manifest().by_name["weight"].dtype == "bfloat16"


def test_a_weight_that_is_complete_is_sent_whole_and_another_one_is_refused_by_name() -> None:
    source = wt.ShardedSource(rows_of(1))
    assert list(source.resident()) == ["norm"]
    ((name, tensor),) = source.stream({"norm"})
    assert name == "norm"
    assert torch.equal(tensor, indices(5))
    with pytest.raises(
        wt.ConfigError, match=r"has only \[0:3, 2:4\], \[0:3, 6:8\] of b: float32 \[3, 8\], which can .*regio"
    ):
        list(source.stream({"b"}))
    with pytest.raises(wt.ConfigError, match=r"has only \[2:4, 0:6\] of a: "):
        list(source)


def test_complete_weights_are_sent_as_those_of_any_source() -> None:
    trainer, model = nn.Linear(3, 2), nn.Linear(3, 2)
    source = wt.ShardedSource([(name, it.shape, [0] * it.ndim, it) for name, it in trainer.named_parameters()])
    config = {"backend": "loopback", "timeout": 10}
    with wt.WeightReceiver(config, model) as receiver, wt.WeightSender(config, [receiver]) as sender:
        for value in (1.0, 2.0, 1.0):
            with torch.no_grad():
                trainer.weight.fill_(value)
            sender.send(source)
            assert torch.equal(model.weight, trainer.weight)


def test_its_shards_are_trusted_by_the_guard_and_cast_by_the_copy() -> None:
    source = wt.ShardedSource(rows_of(0))
    assert GuardedSource(source, source.manifest()).shards() is source.shards()
    assert GuardedSource(source, source.manifest()).whole is False
    cast = wt.CastSource(source, {"a": "bfloat16"})
    assert cast.manifest().by_name["a"].dtype == "bfloat16"
    assert cast.shards()["a"][0].tensor.dtype is torch.float32
    assert not cast.whole


def test_a_rank_may_hold_nothing() -> None:
    source = wt.ShardedSource([])
    assert not source.manifest().params
    assert not source.shards()
    assert not list(source)


ONE = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("a", (3, 2), (2, 0), ONE)],
            r"Shard of 'a' at \[2, 0\] of shape \[2, 2\] lies beyond the full shape \[3, 2\]",
        ),
        ([("a", (3, 2), (-1, 0), ONE)], "lies beyond the full shape"),
        ([("a", (3, 2), (0,), ONE)], r"has 2 dimensions, its offset \[0\] and the full shape \[3, 2\] have 1 and 2"),
        ([("a", (4,), (0,), ONE)], "has 2 dimensions, its offset .* have 1 and 1"),
        ([("a", (4, 2), (0, 0), ONE), ("a", (5, 2), (2, 0), ONE)], r"disagree: one is of a: float32 \[4, 2\], another"),
        ([("a", (4, 2), (0, 0), ONE), ("a", (4, 2), (2, 0), ONE.double())], r"another one of a: float64 \[4, 2\]"),
        ([("a", (4, 2), (0, 0), ONE), ("a", (4, 2), (0, 0), ONE.clone())], r"\[0:2, 0:2\] of 'a' was given twice"),
        ([("a", (4, 2), (0, 0), [1.0])], "A shard is .name, full shape, offset, tensor., got "),
        ([("a", (4, 2.5), (0, 0), ONE)], "A shard is .name, full shape, offset, tensor., got "),
        ([("a", ONE)], r"got \['str', 'Tensor'\]"),
        ([(7, (4, 2), (0, 0), ONE)], r"got \['int', 'tuple', 'tuple', 'Tensor'\]"),
        ([None], "got NoneType"),
        ([("a", (4, 2), (0, 0), ONE.to("meta"))], "'a' lies on the meta device"),
        ([("a", (4, 2), (0, 0), ONE.to_sparse())], "'a' is a sparse_coo tensor"),
        ([("a", (2,), (0,), torch.ones(2, dtype=torch.complex64).conj())], "conjugate or negative view"),
        ({"a": ONE}, "takes .name, full shape, offset, tensor. for each shard, or a function .* got a dict"),
        (nn.Linear(2, 2), "got a Linear"),
        (7, "got a int"),
    ],
)
def test_what_is_no_shard_is_refused_by_name(rows: Any, words: str) -> None:
    with pytest.raises(wt.ConfigError, match=words):
        wt.ShardedSource(rows)


def test_a_tensor_that_knows_its_own_layout_is_refused() -> None:
    class Sharded(nn.Parameter):
        def full_tensor(self) -> torch.Tensor:
            return self.detach()

    with pytest.raises(wt.ConfigError, match="Shard of 'a' is a Sharded, which knows its own layout: send the module"):
        wt.ShardedSource([("a", (2, 2), (0, 0), Sharded(ONE))])


def test_what_was_refused_once_is_refused_again() -> None:
    """A source that kept the bad rows as known would let them pass at the next update."""
    rows = rows_of(0)
    source = wt.ShardedSource(rows)
    rows[0] = ("a", (4, 6), (3, 0), indices(2, 6))
    for _ in range(2):
        with pytest.raises(wt.ConfigError, match="lies beyond"):
            source.manifest()


def test_memory_that_was_freed_is_refused_by_name() -> None:
    tensor = torch.ones(4)
    source = wt.ShardedSource([("a", (4,), (0,), tensor)])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(wt.ConfigError, match="'a' has 0 bytes of memory and needs 16"):
        source.manifest()
