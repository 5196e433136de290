"""What a worker does with weights of its own form: copy them in place; and which loader a model gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from support.loading import Model, Stack, load_in_parts, manifest_of, same, sent_by, snapshot, weights_of
from weight_transfer import KernelFormatLoader, Manifest, ManifestMismatchError, ModuleSource, Region, Target
from weight_transfer.model.checkpoint_loading import loader_for
from weight_transfer.model.declared import DeclaredLoader
from weight_transfer.model.loading import ExpectantLoader, WeightLoader, Weights, destinations_of
from weight_transfer.model.whereabouts import Whereabouts

# Kernel format.


@pytest.mark.parametrize("size", [1, 2, 100])
def test_kernel_format_copies_by_name_into_the_storages_that_are_there(size: int) -> None:
    model, a, b = Model(0), Model(1), Model(2)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    rotary = model.rotary.clone()
    loader = KernelFormatLoader(model)
    for version in (a, b, a):
        load_in_parts(loader, weights_of(version)[::-1], size)
        assert all(torch.equal(tensor, version.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert addresses == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.rotary, rotary)


MISFITS = [
    (lambda weights: weights[:-1], "is missing from the update"),
    (lambda weights: [*weights, ("extra", torch.zeros(1))], "'extra' does not exist in the worker's model"),
    (lambda weights: [*weights, ("rotary", torch.zeros(3))], "'rotary' does not exist in the worker's model"),
    (
        lambda weights: [*weights, ("head.weight", weights[0][1])],
        "'embed.weight' and 'head.weight' are one weight in the worker's model but not on the trainer",
    ),
    (
        lambda weights: [(n, t.t() if t.dim() == 2 else t) for n, t in weights],
        "embed.weight: bfloat16 [4, 6] was sent, but the worker's model has bfloat16 [6, 4]",
    ),
    (
        lambda weights: [(n, t[None] if not t.dim() else t) for n, t in weights],
        "scale: float32 [1] was sent, but the worker's model has float32 []",
    ),
    (
        lambda weights: [(n, t.float()) for n, t in weights],
        "embed.weight: float32 [6, 4] was sent, but the worker's model has bfloat16 [6, 4]",
    ),
]


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_kernel_format_refuses_what_does_not_fit_before_the_first_byte(
    change: Callable[[Weights], Weights], words: str
) -> None:
    model, a = Model(0), Model(1)
    before = snapshot(model)
    loader = KernelFormatLoader(model)
    with pytest.raises(ManifestMismatchError) as caught:
        loader.begin(manifest_of(change(weights_of(a))))
    assert words in str(caught.value)
    assert same(snapshot(model), before)
    load_in_parts(loader, weights_of(a), 2)  # and it is as good as new
    assert not same(snapshot(model), before)


def test_a_parameter_that_the_worker_replaced_is_checked_again() -> None:
    model, weights = Model(0), weights_of(Model(1))
    manifest = manifest_of(weights)
    loader = KernelFormatLoader(model)
    loader.begin(manifest)
    model.scale = nn.Parameter(torch.zeros(2))
    with pytest.raises(ManifestMismatchError, match="scale: float32"):
        loader.begin(manifest)
    model.scale = nn.Parameter(torch.zeros(()))
    loader.begin(manifest)
    loader(weights)
    assert torch.equal(model.scale, dict(weights)["scale"])


@pytest.mark.parametrize("declares", [False, True])
def test_a_model_that_was_looked_at_for_an_expected_update_is_not_looked_at_again(
    declares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Whereabouts] = []

    class Watched(Whereabouts):
        @property
        def unchanged(self) -> bool:
            looks.append(self)
            return super().unchanged

    for module in ("anchors", "sharding", "weights"):
        monkeypatch.setattr(f"weight_transfer.model.{module}.Whereabouts", Watched)
    model = Model(0)
    manifest = manifest_of(weights_of(model))
    loader: WeightLoader = KernelFormatLoader(model)
    if declares:
        loader = DeclaredLoader({"scale": Target(Region.whole(()), model.scale.data)}, model, loader)
    assert isinstance(loader, ExpectantLoader)

    def looks_of(call: Callable[[], object]) -> int:
        looks.clear()
        call()
        return len(looks)

    loader.expect()  # nothing is known yet
    loader.begin(manifest)
    loader.finish()
    plain = looks_of(lambda: loader.begin(manifest))
    assert plain > 0
    loader.finish()
    assert looks_of(loader.expect) == plain
    assert looks_of(lambda: loader.begin(manifest)) == 0
    loader.finish()
    assert looks_of(lambda: loader.begin(manifest)) == plain  # it counts once
    loader.finish()
    for module in ("declared", "loading"):
        monkeypatch.setattr(f"weight_transfer.model.{module}.FRESH", 0.0)
    loader.expect()
    assert looks_of(lambda: loader.begin(manifest)) == plain  # and for a moment only


def test_tensors_that_an_engine_wrote_in_place_are_left_alone() -> None:
    model, weights = Model(0), weights_of(Model(1))
    loader = KernelFormatLoader(model)
    loader.begin(manifest_of(weights))
    targets = loader.destinations()
    with torch.no_grad():
        targets["scale"].fill_(7)
    loader([(name, targets[name] if name == "scale" else tensor) for name, tensor in weights])
    assert model.scale.item() == 7
    assert torch.equal(model.embed.weight, dict(weights)["embed.weight"])


def test_a_plain_callable_offers_no_destinations() -> None:
    assert destinations_of(lambda weights: None) is None


# Which loader a model gets.


def test_a_model_without_a_loader_of_its_own_gets_a_copy_by_name_for_both_formats() -> None:
    loaders = loader_for(Model(0), None, None)
    assert isinstance(loaders[True], KernelFormatLoader)
    assert loaders[True] is loaders[False]


def test_a_models_own_load_weights_takes_checkpoint_format_and_only_that() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.got: list[str] = []

        def load_weights(self, weights: Weights) -> None:
            self.got += [name for name, _ in weights]

    model = Own()
    loaders = loader_for(model, None, None)
    load_in_parts(loaders[True], [("anything.at.all", torch.zeros(1))], 1)  # type: ignore[arg-type]
    assert model.got == ["anything.at.all"]
    load_in_parts(loaders[False], weights_of(nn.Linear(2, 2)), 1)  # type: ignore[arg-type]
    assert model.got == ["anything.at.all"]


# What a worker's model cannot take.


@pytest.mark.parametrize("hook", [None, lambda layer: None], ids=["plain", "with a hook"])
def test_a_worker_on_meta_is_refused_by_name(hook: Callable[[nn.Module], object] | None) -> None:
    model = Model(0)
    model.scale = nn.Parameter(model.scale.to("meta"))
    with pytest.raises(ManifestMismatchError, match="Weight 'scale' lies on the meta device and has no bytes"):
        loader_for(model, None, hook)[True].begin(sent_by(Model(1))[0])


class Extra(nn.Module):
    """Saves a tensor of its own beside its weight: its live one, or a copy; or something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.scale = torch.randn(3)
        self.kind = kind

    def get_extra_state(self) -> object:
        return {"live": self.scale, "copy": self.scale.clone(), "dict": {"scale": 1}, "none": None}[self.kind]

    def set_extra_state(self, state: object) -> None: ...


def test_extra_state_that_is_the_modules_own_tensor_is_loaded() -> None:
    model, source = Extra("live"), Extra("live")
    manifest, weights = sent_by(source)
    assert [name for name, _ in weights] == ["weight", "_extra_state"]
    load_in_parts_of(KernelFormatLoader(model), manifest, weights)
    assert torch.equal(model.scale, source.scale)
    source.scale = torch.randn(3)
    load_in_parts_of(KernelFormatLoader(model), *sent_by(source))
    assert torch.equal(model.scale, source.scale)


def load_in_parts_of(loader: KernelFormatLoader, manifest: Manifest, weights: Weights) -> None:
    loader.begin(manifest)
    loader(weights)
    loader.finish()


def test_extra_state_that_is_a_copy_is_refused_unless_it_is_ignored() -> None:
    model, source = Extra("copy"), Extra("copy")
    with pytest.raises(ManifestMismatchError, match=r"'_extra_state' is computed when the model is saved.*ignore="):
        KernelFormatLoader(model).begin(sent_by(source)[0])
    source_without = ModuleSource(source, ignore=["*_extra_state"])
    loader = KernelFormatLoader(model, ignore=["*_extra_state"])
    loader.begin(source_without.manifest())
    loader(list(source_without))
    assert torch.equal(model.weight, source.weight)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_names_of_wrappers_come_off_on_both_sides() -> None:
    model, source = Stack(1), Stack(1, seed=1)
    processed: list[nn.Module] = []
    loader = loader_for(torch.compile(model), None, processed.append)[True]
    wrapped = nn.Module()
    wrapped.add_module("module", source)
    manifest, weights = sent_by(wrapped)
    loader.begin(manifest)
    loader(weights)
    loader.finish()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.norm in processed
