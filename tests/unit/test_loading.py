"""What a worker does with weights: copy them in place, or hand them to the model's loader, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weight_transfer import (
    CheckpointFormatLoader,
    KernelFormatLoader,
    Manifest,
    ManifestMismatchError,
    ModuleSource,
    ParamMeta,
    Region,
    Target,
)
from weight_transfer.model.checkpoint_loading import loader_for
from weight_transfer.model.declared import DeclaredLoader
from weight_transfer.model.loading import ExpectantLoader, WeightLoader, Weights, destinations_of
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.whereabouts import Whereabouts
from weight_transfer.plan.buckets import as_bytes


class Model(nn.Module):
    """A model of several dtypes, with tied weights and buffers of both kinds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("rotary", torch.randn(3), persistent=False)


def manifest_of(weights: Weights) -> Manifest:
    return Manifest(ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in weights)


def weights_of(model: nn.Module) -> Weights:
    source = ModuleSource(model)
    source.manifest()
    return [(name, tensor.clone()) for name, tensor in source]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: as_bytes(tensor.contiguous()).clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Kernel format.


def load_in_parts(loader: KernelFormatLoader | CheckpointFormatLoader, weights: Weights, size: int) -> None:
    loader.begin(manifest_of(weights))
    for first in range(0, len(weights), size):
        loader(weights[first : first + size])
    loader.finish()


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


# Checkpoint format.


def test_checkpoint_format_calls_load_weights_part_by_part() -> None:
    calls: list[list[str]] = []
    loader = CheckpointFormatLoader(lambda weights: calls.append([name for name, _ in weights]))
    weights = [(f"layers.{i}.weight", torch.zeros(1)) for i in range(5)]
    load_in_parts(loader, weights, 2)
    assert calls == [
        ["layers.0.weight", "layers.1.weight"],
        ["layers.2.weight", "layers.3.weight"],
        ["layers.4.weight"],
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up.weight", "model.layers.3"),
        ("model.layers.3.experts.17.up.weight", "model.layers.3"),
        ("model.layers.13.input_layernorm.weight", "model.layers.13"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.bias", "lm_head"),
        ("0.weight", "0"),
        ("scale", ""),
    ],
)
def test_a_layer_is_the_first_numbered_part_of_a_name_or_the_parameters_owner(name: str, layer: str) -> None:
    assert CheckpointFormatLoader.layer_of(name) == layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.down = nn.Linear(5, 3)


class Stack(nn.Module):
    def __init__(self, depth: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(4, 3)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(3)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 1000])
def test_each_layer_is_processed_once_per_update_right_after_its_last_parameter(size: int) -> None:
    model = Stack(4)
    names = {module: name for name, module in model.named_modules()}
    log: list[str] = []
    loader = CheckpointFormatLoader(
        lambda weights: log.extend(name for name, _ in weights),
        model,
        lambda layer: log.append(f"processed {names[layer]}"),
    )
    weights = weights_of(model)
    expected: list[str] = []
    for index, (name, _) in enumerate(weights):
        expected.append(name)
        layer = CheckpointFormatLoader.layer_of(name)
        if all(CheckpointFormatLoader.layer_of(later) != layer for later, _ in weights[index + 1 :]):
            expected.append(f"processed {layer}")
    assert [line for line in expected if line.startswith("processed")] == [
        "processed embed",
        *(f"processed layers.{i}" for i in range(4)),
        "processed norm",
    ]
    for _ in range(2):
        log.clear()
        load_in_parts(loader, weights, size)
        assert log == expected


def test_a_layer_whose_parameters_are_scattered_is_processed_after_the_last_of_them() -> None:
    model = Stack(2)
    log: list[object] = []
    loader = CheckpointFormatLoader(lambda weights: log.extend(name for name, _ in weights), model, log.append)
    weights = [
        (name, torch.zeros(1))
        for name in ("layers.0.up.weight", "layers.1.up.weight", "layers.0.up.bias", "layers.1.up.bias")
    ]
    load_in_parts(loader, weights, 100)
    assert log == [
        "layers.0.up.weight",
        "layers.1.up.weight",
        "layers.0.up.bias",
        model.layers[0],
        "layers.1.up.bias",
        model.layers[1],
    ]


def test_a_layer_that_the_model_lacks_is_an_error_before_the_first_byte() -> None:
    called: list[object] = []
    loader = CheckpointFormatLoader(called.append, Stack(2), called.append)
    with pytest.raises(ManifestMismatchError, match=r"parameters of layer 'layers\.2', which the worker's model lacks"):
        loader.begin(manifest_of(weights_of(Stack(3))))
    assert called == []


def test_processing_needs_a_model() -> None:
    with pytest.raises(ValueError, match="process_weights_after_loading needs the model"):
        CheckpointFormatLoader(lambda weights: None, None, lambda layer: None)


class QuantLinear(nn.Module):
    """A linear layer that serves int8 weights with a scale per row. A loader gives it bf16 weights for a moment."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("quantised", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(rows, 1))
        self.full: torch.Tensor | None = None

    def quantise(self) -> None:
        assert self.full is not None, "quantised before its weights came, or twice"
        full = self.full.float()
        scale = full.abs().amax(dim=1, keepdim=True) / 127
        self.scale.copy_(scale)
        self.quantised.copy_((full / scale).round().to(torch.int8))
        self.full = None


class QuantModel(nn.Module):
    """What an inference engine makes of a checkpoint with ``layers.N.{up,down}.weight`` in bf16."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": QuantLinear(16, 32), "down": QuantLinear(32, 16)}) for _ in range(depth)
        )
        self.peak = 0

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            layer = self.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, QuantLinear)
            layer.full = tensor.clone()  # the tensors of a transfer are only valid during the call
            self.peak = max(
                self.peak,
                sum(m.full.nbytes for m in self.modules() if isinstance(m, QuantLinear) and m.full is not None),
            )

    @staticmethod
    def process(layer: nn.Module) -> None:
        for module in layer.modules():
            if isinstance(module, QuantLinear):
                module.quantise()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_quantising_on_arrival_holds_one_layer_of_full_weights_at_a_time(size: int) -> None:
    depth, model = 6, QuantModel(6)

    def version(seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"up": (32, 16), "down": (16, 32)}
        return [
            (f"layers.{i}.{part}.weight", torch.randn(shape, generator=generator).bfloat16())
            for i in range(depth)
            for part, shape in shapes.items()
        ]

    loader = loader_for(model, None, QuantModel.process)[True]
    a, b = version(1), version(2)
    results = []
    for weights in (a, b, a):
        load_in_parts(loader, weights, size)  # type: ignore[arg-type]
        results.append(snapshot(model))
        for name, tensor in weights:
            layer = model.get_submodule(name.removesuffix(".weight"))
            error = (layer.quantised.float() * layer.scale - tensor.float()).abs()
            assert (error <= layer.scale / 2 + 1e-6).all()
    assert same(results[0], results[2])
    assert not same(results[0], results[1])
    assert model.peak == 2 * 16 * 32 * 2  # up and down of one layer, in bf16


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


def test_a_loader_that_is_given_beats_the_models_own() -> None:
    model = QuantModel(1)
    got: list[str] = []
    loader = loader_for(model, lambda weights: got.extend(name for name, _ in weights), None)[True]
    load_in_parts(loader, [("a", torch.zeros(1))], 1)  # type: ignore[arg-type]
    assert got == ["a"]


def test_without_a_loader_the_layerwise_stage_copies_by_name() -> None:
    model, a, b = Stack(2, seed=0), Stack(2, seed=1), Stack(2, seed=2)
    processed: list[nn.Module] = []
    loader = loader_for(model, None, processed.append)[True]
    for version in (a, b, a):
        processed.clear()
        load_in_parts(loader, weights_of(version), 3)  # type: ignore[arg-type]
        assert same(snapshot(model), snapshot(version))
        assert processed == [model.embed, *model.layers, model.norm]


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("norm.gain", torch.zeros(3), "'norm.gain' does not exist in the worker's model"),
        ("norm.bias", torch.zeros(2), "norm.bias: float32 [2] was sent, but the worker's model has float32 [3]"),
        (
            "norm.bias",
            torch.zeros(3, dtype=torch.bfloat16),
            "norm.bias: bfloat16 [3] was sent, but the worker's model has float32 [3]",
        ),
    ],
)
def test_the_copy_behind_the_layerwise_stage_checks_each_parameter(name: str, tensor: torch.Tensor, words: str) -> None:
    model = Stack(1)
    before = snapshot(model)
    loader = loader_for(model, None, lambda layer: None)[True]
    with pytest.raises(ManifestMismatchError) as caught:
        load_in_parts(loader, [(name, tensor)], 1)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert same(snapshot(model), before)


def test_a_hook_that_replaces_another_layers_weights_is_found_out() -> None:
    model = Stack(1)

    def spoil(layer: nn.Module) -> None:
        if layer is not model.norm:
            model.norm.bias = nn.Parameter(torch.zeros(5))

    with pytest.raises(ManifestMismatchError, match="may change no layer but its own"):
        load_in_parts(loader_for(model, None, spoil)[True], weights_of(Stack(1, seed=1)), 1)


# Weights that are tied.


class Pair(nn.Module):
    """Two weights ``a`` and ``b`` of one shape, apart or tied in several ways."""

    def __init__(self, tied: str = "") -> None:
        super().__init__()
        first, second = ("b", "a") if tied == "object, b first" else ("a", "b")
        self.register_parameter(first, nn.Parameter(torch.randn(3, 3)))
        one = self.get_parameter(first)
        if tied.startswith("object"):
            self.register_parameter(second, one)
        elif tied == "storage":
            self.register_parameter(second, nn.Parameter(one.data))
        elif tied == "transposed":
            self.register_parameter(second, nn.Parameter(one.data.t()))
        elif tied == "slice":
            self.register_parameter(second, nn.Parameter(torch.cat([one.data, one.data])))
            one.data = self.get_parameter(second).data[:3]
        else:
            self.register_parameter(second, nn.Parameter(torch.randn(3, 3)))


def sent_by(model: nn.Module) -> tuple[Manifest, Weights]:
    source = ModuleSource(model)
    return source.manifest(), [(name, tensor.clone()) for name, tensor in source]


@pytest.mark.parametrize("worker", ["", "object", "object, b first", "storage"])
@pytest.mark.parametrize("trainer", ["object", "object, b first", "storage"])
@pytest.mark.parametrize("in_place", [True, False])
def test_ties_may_be_made_otherwise_on_the_worker_or_not_at_all(trainer: str, worker: str, in_place: bool) -> None:
    for source in (Pair(trainer), Pair(trainer)):
        model = Pair(worker)
        manifest, weights = sent_by(source)
        assert len(weights) == 1
        loader = KernelFormatLoader(model)
        loader.begin(manifest)
        if in_place:
            for name, tensor in weights:
                loader.destinations()[name].data.copy_(tensor)
            weights = list(loader.destinations().items())
        loader(weights)
        loader.finish()
        assert torch.equal(model.a, source.a)
        assert torch.equal(model.b, source.a)


@pytest.mark.parametrize("worker", ["object", "object, b first", "storage"])
def test_what_is_tied_on_the_worker_alone_is_refused(worker: str) -> None:
    model, (manifest, _) = Pair(worker), sent_by(Pair())
    before = snapshot(model)
    with pytest.raises(
        ManifestMismatchError, match=r"'[ab]' and '[ab]' are one weight in the worker's model but not on"
    ):
        KernelFormatLoader(model).begin(manifest)
    assert same(snapshot(model), before)


def test_a_tie_that_was_cut_between_two_updates_is_noticed() -> None:
    model = Pair("storage")
    loader = KernelFormatLoader(model)
    loader.begin(sent_by(Pair("object"))[0])
    model.b.data = model.b.data.clone()
    manifest, weights = sent_by(Pair())
    loader.begin(manifest)
    loader(weights)
    assert torch.equal(model.b, dict(weights)["b"])
    model.b.data = model.a.data
    with pytest.raises(ManifestMismatchError, match="are one weight in the worker's model"):
        loader.begin(manifest)


@pytest.mark.parametrize("tied", ["transposed", "slice"])
def test_weights_that_share_some_of_their_memory_are_refused(tied: str) -> None:
    model = Pair(tied)
    with pytest.raises(ManifestMismatchError, match=r"Weight '[ab]' shares memory with '[ab]'"):
        KernelFormatLoader(model).begin(sent_by(model)[0])


def test_a_weight_whose_elements_are_one_is_refused() -> None:
    model = nn.Module()
    model.register_buffer("scale", torch.ones(1).expand(4))
    with pytest.raises(ManifestMismatchError, match="Weight 'scale' has several elements in one place"):
        KernelFormatLoader(model).begin(sent_by(model)[0])


def test_weights_that_share_memory_from_some_update_on_are_refused() -> None:
    """The parameters are the same objects as before, and the manifest is the same."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    manifest, _ = sent_by(model)
    loader = KernelFormatLoader(model)
    loader.begin(manifest)
    model.a.data = torch.zeros(1).expand(6)
    with pytest.raises(ManifestMismatchError, match="Weight 'a' has several elements in one place"):
        loader.begin(manifest)
    both = torch.zeros(8)
    model.a.data, model.b.data = both[:6], both[2:]
    for _ in range(2):
        with pytest.raises(ManifestMismatchError, match="Weight 'a' shares memory with 'b'"):
            loader.begin(manifest)
    model.b.data = torch.zeros(6)
    loader.begin(manifest)


def test_a_conjugate_view_is_refused() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    manifest, _ = sent_by(model)
    loader = KernelFormatLoader(model)
    loader.begin(manifest)
    model.phase.data = model.phase.data.conj()
    with pytest.raises(ManifestMismatchError, match="Weight 'phase' is a conjugate or negative view"):
        loader.begin(manifest)


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
