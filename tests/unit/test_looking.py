"""A look at a module finds each change at the stage of its weight, and nothing before it was looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weight_transfer.errors import WeightsMovedError
from weight_transfer.model.declared import DeclaredLoader
from weight_transfer.model.loading import KernelFormatLoader, WeightLoader
from weight_transfer.model.looking import Look, Stages, staged
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Target
from weight_transfer.model.staged_loading import StagedLoader
from weight_transfer.model.weights import ModuleWeights

LAYERS = 6


@pytest.fixture(autouse=True)
def one_layer_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 1)
    monkeypatch.setattr("weight_transfer.model.looking._MOST", 1)


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(LAYERS)))


def moved(layer: nn.Module) -> None:
    layer.weight.data = torch.ones(2, 2)


def replaced(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(torch.ones(2))


def more(layer: nn.Module) -> None:
    layer.register_buffer("scale", torch.ones(2))


CHANGES = (moved, replaced, more)


@pytest.mark.parametrize("number", range(LAYERS))
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_its_stage(change: Callable[[nn.Module], None], number: int) -> None:
    module = layers()
    weights = ModuleWeights(module)
    weights.read()
    assert [weights.stages[f"{each}.weight"] for each in range(LAYERS)] == list(range(LAYERS))
    change(module[number])
    look = weights.look()
    assert [look.reach(stage) for stage in range(LAYERS)] == [stage < number for stage in range(LAYERS)]
    assert look.is_over
    assert not look.is_right
    assert weights.look(moved=False).finish() is (change is moved)
    weights.read()
    assert weights.look().finish()


def test_a_look_that_goes_on_reaches_one_stage_after_the_other_and_none_twice() -> None:
    seen: list[int] = []

    def stage(number: int) -> bool:
        seen.append(number)
        return number != 3

    look = Look([lambda number=number: stage(number) for number in range(5)])  # type: ignore[misc]
    assert look.go_on()
    assert look.reach(2)
    assert look.reach(1)
    assert not look.is_over
    assert not look.finish()
    assert look.is_over
    assert not look.go_on()
    assert seen == [0, 1, 2, 3]
    assert Look([]).is_over
    assert Look([]).finish()


def test_stages_grow_and_leave_no_module_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 4)
    monkeypatch.setattr("weight_transfer.model.looking._MOST", 9)
    modules = list(nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))).modules())
    cut = list(staged(modules))
    assert [module for stage in cut for module in stage] == modules
    own = [sum(len(module._parameters) for module in stage) for stage in cut]
    assert own[:3] == [4, 6, 10]
    assert max(own) <= 10


def test_the_stage_of_many_weights_is_that_of_the_last() -> None:
    stages = Stages({"a": 0, "b": 2, "c": 1})
    some = ("c", "a")
    assert [stages.of(some), stages.of(some), stages.of(["a", "b"]), stages.of(()), stages.of(iter("ac"))] == [
        1,
        1,
        2,
        0,
        1,
    ]
    with pytest.raises(KeyError):
        stages.of(("d",))


def manifest_of(module: nn.Module) -> Manifest:
    return Manifest(ParamMeta(name, dtype_name(it.dtype), it.shape) for name, it in module.state_dict().items())


def begun(loader: KernelFormatLoader, manifest: Manifest) -> None:
    """Begin an update of a loader that has found the model as it was for a while."""
    for _ in range(3):
        loader.begin_in_stages(manifest)
        loader.finish()
    loader.begin_in_stages(manifest)


@pytest.mark.parametrize("change", CHANGES)
def test_a_loader_vouches_for_what_it_has_looked_at_and_no_more(change: Callable[[nn.Module], None]) -> None:
    module = layers()
    loader, manifest = KernelFormatLoader(module), manifest_of(module)
    begun(loader, manifest)
    loader.vouch(["1.weight"])
    change(module[4])
    loader.vouch(["3.bias", "0.weight"])
    with pytest.raises(WeightsMovedError):
        loader.vouch(["2.weight", "4.weight"])
    loader.abort("moved", touched=True)
    if change is more:
        return
    loader.begin_in_stages(manifest)  # it looks at everything first now
    assert loader.destinations()["4.weight"] is module[4].weight
    loader.vouch()
    module[5].weight.data = torch.ones(2, 2)
    loader.vouch()  # as before an update of one that does not look in stages
    loader.finish()


@pytest.mark.parametrize("change", [moved, replaced])
def test_a_change_in_the_first_stage_is_seen_when_an_update_begins(change: Callable[[nn.Module], None]) -> None:
    module = layers()
    loader, manifest = KernelFormatLoader(module), manifest_of(module)
    begun(loader, manifest)
    loader.finish()
    change(module[0])
    loader.begin_in_stages(manifest)
    assert loader.destinations()["0.weight"] is module[0].weight
    loader([("0.weight", torch.full((2, 2), 3.0)), ("0.bias", torch.full((2,), 4.0))])
    loader.finish()
    assert torch.equal(module[0].weight, torch.full((2, 2), 3.0))
    assert torch.equal(module[0].bias, torch.full((2,), 4.0))


@pytest.mark.parametrize("late", ["call", "finish"])
def test_what_nobody_asked_for_is_looked_at_before_it_is_loaded_and_in_the_end(late: str) -> None:
    module = layers()
    loader, manifest = KernelFormatLoader(module), manifest_of(module)
    begun(loader, manifest)
    old = module[5].weight
    module[5].weight = nn.Parameter(torch.zeros(2, 2))
    before = old.detach().clone()
    with pytest.raises(WeightsMovedError):
        loader([("5.weight", torch.ones(2, 2))]) if late == "call" else loader.finish()
    assert torch.equal(old, before)


@pytest.mark.parametrize("kind", ["plain", "declared", "staged"])
def test_whoever_does_not_ask_for_stages_has_all_looked_at_first(kind: str) -> None:
    """Loaders around it, and a user's own, call ``begin`` and nothing else."""
    module = layers()
    own, manifest = KernelFormatLoader(module), manifest_of(module)
    loader: WeightLoader = own
    if kind == "declared":
        loader = DeclaredLoader({"1.bias": Target(Region.whole((2,)), module[1].bias.data)}, module, own)
    elif kind == "staged":
        loader = StagedLoader(own, "device")
    for _ in range(4):
        loader.begin(manifest)
        own.finish()
    replaced(module[5])
    loader.begin(manifest)
    assert own.destinations()["5.bias"] is module[5].bias
    own.vouch()


def test_stages_are_numbered_anew_when_the_model_is_cut_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """More buffers that are not sent: the weights are the same objects, but lie in later stages."""
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 4)
    monkeypatch.setattr("weight_transfer.model.looking._MOST", 4)
    module = layers()
    loader, manifest = KernelFormatLoader(module), manifest_of(module)
    begun(loader, manifest)
    loader.finish()
    for layer in module:
        for name in ("a", "b", "c"):
            layer.register_buffer(name, torch.zeros(1), persistent=False)
    begun(loader, manifest)
    replaced(module[5])
    with pytest.raises(WeightsMovedError):
        loader.vouch(["5.bias"])


def test_a_look_speaks_of_what_the_loader_has_seen_and_nobody_else_read() -> None:
    """Whoever asks for the weights in between has the reader see new ones, and the loader not."""
    module = layers()
    loader, manifest = KernelFormatLoader(module), manifest_of(module)
    begun(loader, manifest)
    loader.finish()
    replaced(module[5])
    loader.weights()
    loader.begin_in_stages(manifest)
    assert loader.destinations()["5.bias"] is module[5].bias
    loader.expect()
    replaced(module[4])
    loader.weights()
    loader.begin(manifest)
    assert loader.destinations()["4.bias"] is module[4].bias
