"""A LoRA model's merged weights are those of PEFT's own merge, bit by bit, and the model stays as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer import CastSource, ConfigError, MergedLoraSource
from weight_transfer.model.lora import _Merge
from weight_transfer.model.partial import PartialSource
from weight_transfer.testing.models import digest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's advice is not what is tested


class Experts(nn.Module):
    """Parameters that are in no layer of their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 8, dtype=dtype))
        self.down = nn.Parameter(torch.randn(2, 8, 16, dtype=dtype))


class Base(nn.Module):
    """Whatever LoRA can be put on."""

    def __init__(self, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(16, 24, dtype=dtype), "k": nn.Linear(16, 8, bias=False, dtype=dtype)})
            for _ in range(3)
        )
        self.conv = nn.Conv2d(4, 6, 3, dtype=dtype)
        self.point = nn.Conv2d(4, 6, 1, dtype=dtype)
        self.wave = nn.Conv1d(4, 6, 3, dtype=dtype)
        self.head = nn.Linear(16, 40, bias=False, dtype=dtype)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.experts = Experts(dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.embed(x))
        return hidden


def lora(model: Any, **config: Any) -> Any:
    """Return a PEFT model whose adapters are not zero."""
    torch.manual_seed(7)
    config = {"r": 4, "target_modules": ["q", "k"], "init_lora_weights": False} | config
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def expected(model: Any) -> dict[str, torch.Tensor]:
    merged = copy.deepcopy(model).merge_and_unload()
    buffers = {name: buffer for name, buffer in merged.named_buffers() if name in merged.state_dict()}
    return {name: tensor.detach() for name, tensor in (*merged.named_parameters(), *buffers.items())}


def assert_merged(model: Any) -> MergedLoraSource:
    """Compare with PEFT's own merge, and see that the model is what it was."""
    before, storages = digest(model), [parameter.data_ptr() for parameter in model.parameters()]
    wanted = expected(model)
    source = MergedLoraSource(model)
    assert [(param.name, param.dtype) for param in source.manifest().params] == [
        (name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in source
    ]
    sent = dict(source)
    manifest = source.manifest()
    assert sent.keys() == wanted.keys()
    assert manifest.aliases.keys() == names_of(copy.deepcopy(model).merge_and_unload()) - wanted.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    assert source.manifest() is source.manifest()
    assert source.resident() is source.resident()
    assert digest(model) == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["embed"]},
        {"target_modules": ["conv", "point", "wave"]},
        {"target_modules": ["q", "embed", "conv"], "rank_pattern": {"layers.1.q": 7}, "alpha_pattern": {"conv": 3}},
        {"use_rslora": True},
        {"target_modules": ["q"], "lora_bias": True},
        {"target_modules": ["q"], "modules_to_save": ["head", "conv"]},
        {"bias": "all"},
    ],
    ids=["linear", "embedding", "conv", "patterns", "rslora", "lora bias", "modules to save", "trained biases"],
)
def test_merged_weights_are_those_of_pefts_own_merge(config: dict[str, Any], dtype: torch.dtype) -> None:
    model = lora(Base(dtype), **config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    assert_merged(model)


def test_adapters_of_another_dtype_than_the_base_are_added_as_peft_adds_them() -> None:
    model = lora(Base(torch.bfloat16), target_modules=["q", "embed", "conv"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert_merged(model)


def test_several_active_adapters_are_added_in_their_order() -> None:
    model = lora(Base())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    model.base_model.set_adapter(["other", "default"])
    assert_merged(model)


def test_what_is_merged_already_is_not_merged_twice() -> None:
    model = lora(Base())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    model.merge_adapter()
    assert len(assert_merged(model).resident()) == len(expected(model))
    model.base_model.set_adapter(["default", "other"])
    assert_merged(model)


def test_a_tied_weight_is_merged_once_whichever_side_has_the_adapter() -> None:
    assert_merged(lora(Base(tied=True), target_modules=["embed"]))
    assert_merged(lora(Base(tied=True), target_modules=["head"]))
    assert_merged(lora(Base(tied=True), target_modules=["head", "embed"]))


def test_a_tied_weight_whose_other_side_is_saved_as_a_module_is_still_sent() -> None:
    assert_merged(lora(Base(tied=True), modules_to_save=["embed"]))


def test_a_transposed_layer_is_merged_transposed() -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )
    assert_merged(lora(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, modules_to_save=["ln_f"]))


@pytest.mark.parametrize("parameters", [["experts.up"], ["experts.up", "experts.down"]], ids=["one", "nested"])
def test_parameters_that_are_no_layers_are_merged_too(parameters: list[str]) -> None:
    assert_merged(lora(Base(), target_modules=["q"], target_parameters=parameters))


def test_layers_that_were_injected_without_a_peft_model_are_found() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False), Base())
    names = {name for name, _ in MergedLoraSource(model)}
    assert "layers.0.q.weight" in names
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_only_what_adapters_touch_is_a_copy_and_it_stays_valid() -> None:
    model = lora(Base())
    source = MergedLoraSource(model)
    source.manifest()
    assert "layers.0.q.weight" not in source.resident()
    assert source.resident()["embed.weight"] is model.get_base_model().embed.weight
    kept = dict(source)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in expected(model).items())


def test_what_no_adapter_touches_can_be_sent_by_region() -> None:
    model = lora(Base())
    source = MergedLoraSource(model)
    source.manifest()
    shards = source.shards()
    assert shards.keys() == source.resident().keys()
    assert "layers.0.q.weight" not in shards
    assert shards["embed.weight"][0].tensor is model.get_base_model().embed.weight
    source.manifest()
    assert source.shards() is shards
    model.merge_adapter()
    source.manifest()
    assert "layers.0.q.weight" in source.shards()


def test_a_part_is_merged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(Base())
    wanted, merged = expected(model), 0
    add_to = _Merge.add_to

    def counted(self: _Merge, weight: torch.Tensor) -> None:
        nonlocal merged
        merged += 1
        add_to(self, weight)

    monkeypatch.setattr(_Merge, "add_to", counted)
    part = PartialSource(MergedLoraSource(model), ["layers.0.q.weight", "embed.*"])
    part.manifest()
    got = dict(part)
    assert got.keys() == {"layers.0.q.weight", "embed.weight"}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())
    assert merged == 1


def test_a_step_of_the_adapters_reaches_the_next_pass() -> None:
    model = lora(Base())
    source = MergedLoraSource(model)
    first = dict(source)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(3)
    assert not torch.equal(dict(source)["layers.0.q.weight"], first["layers.0.q.weight"])
    assert_merged(model)


def test_merged_weights_can_be_cast() -> None:
    model = lora(Base())
    cast = CastSource(MergedLoraSource(model), {"*": "bfloat16", "head.*": "float32"})
    cast.manifest()
    wanted = expected(model)
    for name, tensor in cast:
        dtype = wanted[name].dtype if not wanted[name].is_floating_point() or "head" in name else torch.bfloat16
        assert torch.equal(tensor, wanted[name].to(dtype)), name


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: lora(Base(), use_dora=True), r"layers\.0\.q: .* with Dora"),
        (lambda: peft.get_peft_model(Base(), peft.IA3Config(target_modules=["q"], feedforward_modules=[])), "ia3"),
        (lambda: peft.get_peft_model(Base(), peft.LoHaConfig(target_modules=["q"])), "loha"),
        (lambda: peft.get_peft_model(Base(), peft.AdaLoraConfig(target_modules=["q"], total_step=9)), "adalora"),
        (lambda: lora(Base(), trainable_token_indices={"embed": [1, 2]}), "embed: .*TrainableTokens"),
        (Base, "Base has none"),
    ],
    ids=["DoRA", "IA3", "LoHa", "AdaLoRA", "trainable tokens", "no adapter"],
)
def test_what_cannot_be_merged_like_this_is_refused_by_name(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MergedLoraSource(make())
