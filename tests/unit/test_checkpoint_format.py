"""Weights as checkpoints have them: they are handed to the model's loader, and each layer is processed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from support.loading import Stack, load_in_parts, manifest_of, same, snapshot, weights_of
from weight_transfer import CheckpointFormatLoader, ManifestMismatchError
from weight_transfer.model.checkpoint_loading import loader_for

if TYPE_CHECKING:
    from weight_transfer.model.loading import Weights


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
