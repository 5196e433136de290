"""A source of some weights: named by patterns, marked as a part, gathered or read without the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weight_transfer import CheckpointSource, ConfigError, ModuleSource
from weight_transfer.model.partial import PartialSource
from weight_transfer.model.safetensors_file import Entry, Reader


def model() -> nn.Module:
    result = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    result.head = nn.Linear(2, 2)
    result.head.register_parameter("weight", result[0].get_parameter("weight"))
    return result


def part(only: list[str]) -> PartialSource:
    return PartialSource(ModuleSource(model()), only)


def test_patterns_choose_weights_and_the_manifest_says_that_it_is_a_part() -> None:
    source = part(["1.*", "2.running_*"])
    manifest = source.manifest()
    assert manifest.partial
    assert manifest.digest != ModuleSource(model()).manifest().digest
    names = ["1.weight", "1.bias", "2.running_mean", "2.running_var"]
    assert [param.name for param in manifest.params] == names
    assert [name for name, _ in source] == names
    assert list(source.resident()) == names
    assert source.manifest() is manifest


def test_a_tied_weight_is_chosen_by_either_name() -> None:
    for only in (["head.weight"], ["0.weight"]):
        manifest = part(only).manifest()
        assert [param.name for param in manifest.params] == ["0.weight"]
        assert manifest.aliases == {"head.weight": "0.weight"}


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"only: 'lm_head\.\*' matches none of the 10 weights"):
        part(["1.*", "lm_head.*"]).manifest()


@pytest.mark.parametrize("only", ["1.*", [], [1], None])
def test_patterns_are_a_list_of_texts(only: Any) -> None:
    with pytest.raises(ConfigError, match="only: expected a list of names or patterns"):
        PartialSource(ModuleSource(model()), only)


def test_shards_are_those_of_what_is_chosen() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source = PartialSource(ModuleSource(module), ["1.*"])
    source.manifest()
    shards = source.shards()
    assert list(shards) == ["1.weight", "1.bias"]
    assert shards["1.weight"][0].tensor is module[1].weight
    source.manifest()
    assert source.shards() is shards
    module[1].weight = nn.Parameter(torch.ones(2, 2))
    source.manifest()
    assert source.shards()["1.weight"][0].tensor is module[1].weight
    assert source.whole


def test_what_is_not_chosen_is_not_gathered() -> None:
    gathered: list[str] = []

    class Sharded(nn.Parameter):
        def full_tensor(self) -> torch.Tensor:
            gathered.append("one")
            return self.detach().clone()

    module = model()
    module[1].weight = Sharded(torch.ones(2, 2))
    source = PartialSource(ModuleSource(module), ["1.bias"])
    source.manifest()
    assert [name for name, _ in source] == ["1.bias"]
    assert gathered == []


def test_what_is_not_chosen_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    read: list[str] = []
    honest = Reader.read

    def recorded(self: Reader, entry: Entry) -> torch.Tensor:
        read.append(entry.meta.name)
        return honest(self, entry)

    monkeypatch.setattr(Reader, "read", recorded)
    source = PartialSource(CheckpointSource(tmp_path), ["b"])
    source.manifest()
    assert torch.equal(dict(source)["b"], torch.ones(3))
    assert read == ["b"]


def test_what_a_subclass_yields_is_what_a_part_of_it_yields() -> None:
    class Doubled(ModuleSource):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor * 2) for name, tensor in super().__iter__())

    module = model()
    source = PartialSource(Doubled(module), ["1.bias"])
    source.manifest()
    assert torch.equal(dict(source)["1.bias"], module[1].bias.detach() * 2)
