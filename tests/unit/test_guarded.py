"""What is sent is what the manifest says, whatever a source does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer import (
    Manifest,
    ManifestMismatchError,
    ModuleSource,
    ParamMeta,
    TransferError,
    WeightReceiver,
    WeightSender,
    WeightSource,
)
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Shard
from weight_transfer.session.guarded import GuardedSource

LOOPBACK = {"backend": "loopback", "timeout": 10, "bucket_bytes": 256}
Rows = list[tuple[str, torch.Tensor]]


def rows() -> Rows:
    return [(name, torch.full((40,), float(index))) for index, name in enumerate("abc")]


class Stream(WeightSource):
    """Promises one thing and yields another."""

    def __init__(self, promised: Rows, yielded: Callable[[], Iterator[Any]]) -> None:
        self._manifest = Manifest(ParamMeta(name, dtype_name(t.dtype), t.shape) for name, t in promised)
        self._yielded = yielded

    def manifest(self) -> Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._yielded()


def worker() -> nn.Module:
    model = nn.Module()
    for name, tensor in rows():
        model.register_buffer(name, torch.full_like(tensor, -1))
    return model


def changed(change: Callable[[Rows], Any]) -> Callable[[], Iterator[Any]]:
    def stream() -> Iterator[Any]:
        some = rows()
        return iter(change(some) or some)

    return stream


WRONG: dict[str, tuple[Callable[[], Iterator[Any]], str]] = {
    "another order": (
        changed(lambda r: r[::-1]),
        r"yielded c: float32 \[40\] where its manifest has a: float32 \[40\]",
    ),
    "two swapped": (changed(lambda r: [r[0], r[2], r[1]]), "yielded c: .* where its manifest has b"),
    "one twice": (changed(lambda r: [r[0], r[0], *r[1:]]), "yielded a: .* where its manifest has b"),
    "one too many": (
        changed(lambda r: [*r, ("d", torch.ones(1))]),
        "yielded 'd' after the last weight of its manifest",
    ),
    "one too few": (changed(lambda r: r[:2]), r"ended before c: float32 \[40\]"),
    "nothing": (changed(lambda r: iter(())), "ended before a"),
    "another dtype": (changed(lambda r: [(n, t.double()) for n, t in r]), r"yielded a: float64 \[40\] where"),
    "another shape": (changed(lambda r: [(n, t.view(8, 5)) for n, t in r]), r"yielded a: float32 \[8, 5\] where"),
    "another name": (changed(lambda r: [(n.upper(), t) for n, t in r]), "yielded A: .* where its manifest has a"),
    "a list": (changed(lambda r: [(n, t.tolist()) for n, t in r]), "yielded a list where its manifest has a: "),
    "meta": (changed(lambda r: [(n, t.to("meta")) for n, t in r]), "yielded 'a' on the meta device"),
    "sparse": (changed(lambda r: [(n, t.to_sparse()) for n, t in r]), "yielded 'a' of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("verify", ["none", "wire"])
@pytest.mark.parametrize(("stream", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_source_that_yields_something_else_than_its_manifest_publishes_nothing(
    stream: Callable[[], Iterator[Any]], words: str, verify: str
) -> None:
    config = LOOPBACK | {"verify": verify}
    model = worker()
    with WeightReceiver(config, model) as receiver, WeightSender(config, [receiver]) as sender:
        sender.send(Stream(rows(), changed(lambda r: r)), version=1)
        with pytest.raises(ManifestMismatchError, match=f"The source of the weights {words}"):
            sender.send(Stream(rows(), stream), version=2)
        assert receiver.version in (None, 1)  # 1 if not a byte had arrived
        sender.send(Stream(rows(), changed(lambda r: r)), version=3)
        assert receiver.version == 3
        assert all(torch.equal(tensor, model.get_buffer(name)) for name, tensor in rows())


@pytest.mark.parametrize("item", [3, ("a",), ("a", torch.ones(40), 1)], ids=["number", "one", "three"])
def test_a_source_that_yields_no_pairs_is_an_error_with_its_cause(item: Any) -> None:
    with WeightReceiver(LOOPBACK, worker()) as receiver, WeightSender(LOOPBACK, [receiver]) as sender:
        with pytest.raises(TransferError, match="unpack"):
            sender.send(Stream(rows(), lambda: iter([item])))
        assert receiver.version is None


# Memory that the source uses again.


def reusing() -> Iterator[tuple[str, torch.Tensor]]:
    buffer = torch.empty(40)
    for name, tensor in rows():
        yield name, buffer.copy_(tensor)
    buffer.fill_(99)


def freeing() -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in rows():
        yield name, tensor
        tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("stream", [reusing, freeing])
@pytest.mark.parametrize("bucket_bytes", [256, 4096])
def test_a_tensor_needs_to_be_valid_only_until_the_next_one_is_asked_for(
    stream: Callable[[], Iterator[Any]], bucket_bytes: int
) -> None:
    config = LOOPBACK | {"bucket_bytes": bucket_bytes, "verify": "wire"}
    model = worker()
    with WeightReceiver(config, model) as receiver, WeightSender(config, [receiver]) as sender:
        sender.send(Stream(rows(), stream))
    assert all(torch.equal(tensor, model.get_buffer(name)) for name, tensor in rows())


# What a source calls resident.


class Resident(Stream):
    def __init__(self, resident: Mapping[str, torch.Tensor]) -> None:
        super().__init__(rows(), lambda: iter(rows()))
        self._resident = resident

    def resident(self) -> Mapping[str, torch.Tensor]:
        return self._resident


def test_what_is_resident_comes_in_the_manifests_order() -> None:
    source = Resident(dict(rows()[::-1]))
    assert list(GuardedSource(source, source.manifest()).resident()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("resident", "words"),
    [
        ({"a": torch.ones(40).double()}, r"has resident a: float64 \[40\] where its manifest has a: float32 \[40\]"),
        ({"a": torch.ones(41)}, r"has resident a: float32 \[41\] where"),
        ({"z": torch.ones(40)}, "has 'z' resident, which is not in its manifest"),
        ({"a": None}, "has resident a NoneType where its manifest has a: "),
    ],
)
def test_what_is_resident_is_what_the_manifest_says(resident: Any, words: str) -> None:
    source = Resident(resident)
    with pytest.raises(ManifestMismatchError, match=words):
        GuardedSource(source, source.manifest()).resident()


class Sharded(Stream):
    def __init__(self, shards: Any) -> None:
        super().__init__(rows(), lambda: iter(rows()))
        self._shards = shards

    def shards(self) -> Any:
        return self._shards


def shard(offset: int, tensor: Any) -> Shard:
    return Shard(Region([offset], [getattr(tensor, "numel", int)()]), tensor)


def test_shards_come_in_the_manifests_order() -> None:
    source = Sharded({"c": [shard(0, torch.ones(40))], "a": (shard(10, torch.ones(4)), shard(0, torch.ones(2).half()))})
    guarded = GuardedSource(source, source.manifest())
    assert {name: len(own) for name, own in guarded.shards().items()} == {"a": 2, "c": 1}
    assert list(guarded.shards()) == ["a", "c"]
    assert guarded.whole


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ({"z": []}, "has shards of 'z', which is not in its manifest"),
        ({"a": [shard(38, torch.ones(3))]}, r"has a shard \[38:41\] that lies beyond a: float32 \[40\]"),
        ({"a": [Shard(Region([0, 0], [4, 1]), torch.ones(4, 1))]}, r"has a shard \[0:4, 0:1\] that lies beyond a: "),
        ({"a": [Shard(Region([0], [4]), torch.ones(5))]}, r"has float32 \[5\] for the shard \[0:4\] of a: "),
        ({"a": [shard(0, torch.ones(4).int())]}, r"has int32 \[4\] for the shard \[0:4\] of a: float32"),
        ({"a": [shard(0, torch.ones(4).to("meta"))]}, "has a shard of 'a' on the meta device"),
        ({"a": [shard(0, None)]}, "has a NoneType for a shard of a: "),
        ({"a": [torch.ones(1)]}, "has a Tensor for a shard of a: "),
    ],
)
def test_shards_are_parts_of_what_the_manifest_says(shards: Any, words: str) -> None:
    source = Sharded(shards)
    guarded = GuardedSource(source, source.manifest())
    with pytest.raises(ManifestMismatchError, match=words) as raised:
        guarded.shards()
    assert guarded.error is raised.value


def test_the_shards_of_a_module_are_its_own() -> None:
    source = ModuleSource(nn.Linear(2, 2))
    assert GuardedSource(source, source.manifest()).shards() is source.shards()


def test_a_module_source_that_casts_on_the_way_has_nothing_resident() -> None:
    """A subclass may cast what it yields and forget that the weights lie in memory otherwise."""

    class Casting(ModuleSource):
        def manifest(self) -> Manifest:
            return Manifest(ParamMeta(p.name, "bfloat16", p.shape) for p in super().manifest().params)

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor.bfloat16()) for name, tensor in super().__iter__())

    source = Casting(nn.Linear(2, 2))
    guarded = GuardedSource(source, source.manifest())
    assert [tensor.dtype for _, tensor in guarded] == [torch.bfloat16] * 2
    assert not guarded.resident()


def test_a_mapping_that_was_changed_in_place_is_another_object_to_an_engine() -> None:
    resident = dict(rows())
    source = Resident(resident)
    first = GuardedSource(source, source.manifest()).resident()
    resident["a"] = torch.ones(40)
    second = GuardedSource(source, source.manifest()).resident()
    assert second is not first
    assert second["a"] is resident["a"]


# The sender.


def test_a_module_is_sent_under_its_own_names_after_a_source_that_renamed_it() -> None:
    module, names = nn.Linear(2, 2), []

    def load(weights: Rows) -> None:
        names.extend(name for name, _ in weights)

    with (
        WeightReceiver(LOOPBACK, nn.Linear(2, 2), load_weights=load) as receiver,
        WeightSender(LOOPBACK, [receiver]) as sender,
    ):
        sender.send(ModuleSource(module, rename=lambda name: f"model.{name}"))
        sender.send(module)
        sender.send(ModuleSource(module, rename=lambda name: f"other.{name}"))
        sender.send(module)
    assert names == ["model.weight", "model.bias", "weight", "bias", "other.weight", "other.bias", "weight", "bias"]


def test_a_pass_with_collectives_is_finished_after_a_mismatch_too() -> None:
    """The other ranks are in the same collectives, whatever this one has found."""
    gathered: list[str] = []

    class Collective(Stream):
        collective = True

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().__iter__():
                gathered.append(name)
                yield name, tensor

    source = Collective(rows(), changed(lambda r: r[::-1]))
    guarded = GuardedSource(source, source.manifest())
    with pytest.raises(ManifestMismatchError):
        list(guarded)
    guarded.drain()
    assert gathered == ["c", "b", "a"]


def test_a_source_that_does_not_yield_for_long_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weight_transfer.session.guarded.LONG", 0.05)
    logged = threading.Event()
    monkeypatch.setattr(logging.getLogger("weight_transfer.session.guarded"), "warning", lambda *_: logged.set())

    def slow() -> Iterator[Any]:
        for name, tensor in rows():
            if name == "b":
                assert logged.wait(10), "it was to be logged while the source stands still"
            yield name, tensor

    with WeightReceiver(LOOPBACK, worker()) as receiver, WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(Stream(rows(), slow))
