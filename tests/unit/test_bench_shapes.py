"""The shapes that ``weight-transfer bench`` sends are those of the models whose names they bear."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from weight_transfer.bench.architectures import shapes_of
from weight_transfer.bench.configurations import configuration, model_shape, names
from weight_transfer.errors import ConfigError

PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 291),
    "llama-3.1-70b": (70_553_706_496, 723),
    "qwen3-30b-a3b": (30_532_122_624, 18_867),
    "deepseek-v3": (671_026_419_200, 45_395),
}
"""Parameters and tensors, without DeepSeek's module for further tokens."""

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 80}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SMALL = {
    "llama": TINY,
    "mistral": TINY | {"head_dim": 8},
    "qwen2": TINY | {"tie_word_embeddings": True},
    "qwen3": TINY | {"head_dim": 32, "attention_bias": True},
    "qwen3_moe": TINY | {"num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    "deepseek_v3": TINY
    | LATENT
    | {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 2, "first_k_dense_replace": 1},
}


def test_published_models_have_their_published_sizes() -> None:
    found = {name: model_shape(name).shapes for name in names()}
    counts = {name: (sum(map(math.prod, shapes.values())), len(shapes)) for name, shapes in found.items()}
    assert counts == PUBLISHED
    assert all(configuration(name)["source"].startswith("https://huggingface.co/") for name in names())


@pytest.mark.parametrize("kind", SMALL)
def test_names_and_shapes_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    fields = SMALL[kind] | {"num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    expected = {name: shape for key, tensor in state.items() for name, shape in by_expert(key, tuple(tensor.shape))}
    if fields.get("tie_word_embeddings"):
        expected.pop("lm_head.weight", None)  # a checkpoint has it once
    assert shapes_of(fields | {"model_type": kind}) == expected


def by_expert(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return what a checkpoint has for a weight in which transformers keeps all experts of a layer together."""
    prefix, found, last = name.partition(".experts.")
    if not found or len(shape) != 3:
        return [(name, shape)]
    experts, rows, columns = shape
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    return [
        (f"{prefix}.experts.{expert}.{part}.weight", (rows // len(parts), columns))
        for expert in range(experts)
        for part in parts
    ]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("budget", [10**8, 10**10])
def test_a_model_is_made_to_fit(name: str, budget: int) -> None:
    model = model_shape(name, budget=budget)
    assert budget / 4 < model.nbytes <= budget
    experts = [key for key in model.shapes if ".experts." in key]
    assert bool(experts) == (name in ("qwen3-30b-a3b", "deepseek-v3")), "a mixture stays one"
    assert model_shape(name, layers=model.layers, width=model.width) == model
    assert model.published_layers == configuration(name)["num_hidden_layers"]


def test_a_path_is_a_shape_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL["llama"] | {"model_type": "llama", "num_hidden_layers": 3}))
    model = model_shape(str(tmp_path), layers=2)
    assert model == model_shape(str(path), layers=2)
    assert model.name == tmp_path.name
    assert (model.layers, model.published_layers, len(model.shapes)) == (2, 3, 21)


def config(**changes: Any) -> str:
    return json.dumps(SMALL["llama"] | {"model_type": "llama", "num_hidden_layers": 2} | changes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list, and a configuration is an object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "num_hidden_layers of .* must be a whole number from 1 on, got None"),
        (config(num_hidden_layers=True), "must be a whole number from 1 on, got True"),
        (config(model_type=["llama"]), r"model_type \['llama'\] of the configuration is not known"),
        (config(hidden_size=None), "lacks 'hidden_size'"),
        (config(hidden_size="64"), "hidden_size of the configuration must be a whole number from 1 on, got '64'"),
        (config(num_attention_heads=0), "num_attention_heads of the configuration must be a whole number from 1 on"),
        (config(vocab_size=-80), "vocab_size of the configuration must be a whole number from 1 on, got -80"),
        (config(model_type="qwen3_moe", mlp_only_layers=0), "mlp_only_layers of the configuration must be a list"),
        (config(model_type="qwen3_moe", num_experts=10**9), "more than 1,000,000 experts in all"),
        ('{"num_hidden_layers": 1, "model_type": "mamba"}', "'mamba' of the configuration is not known"),
        ('{"num_hidden_layers": 1, "model_type": "llama"}', "lacks 'hidden_size', which a llama model has"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        model_shape(str(path))


def test_an_unknown_shape_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"deepseek-v3, llama-3.1-70b, .*; did you mean 'llama-3.1-8b'\?"):
        model_shape("llama-3.1-8")
    with pytest.raises(ConfigError, match="has 32 layers, fewer than 33"):
        model_shape("llama-3.1-8b", layers=33)


def test_a_folder_without_a_configuration_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no shape .*, and no such file"):
        model_shape(str(tmp_path))
