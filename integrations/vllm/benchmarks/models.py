"""Models of vLLM's own classes on the CPU, with random weights and no engine around them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from weight_transfer import Manifest, ParamMeta

COMMON = {
    "hidden_act": "silu",
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 20480,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 20480,
    },
}
"""1,611 weights of 0.46 GB, and 147 of 0.44 GB."""


def config_of(name: str, tensor_parallel: int) -> VllmConfig:
    """Return vLLM's configuration of one of `CONFIGS`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(COMMON | CONFIGS[name]))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=64,
            tensor_parallel_size=tensor_parallel,
        ).create_engine_config()


@contextmanager
def rank_of(config: VllmConfig, rank: int, store: str) -> Iterator[None]:
    """Be one rank of tensor parallelism; a model is built, loaded and processed in this block.

    Args:
        config: vLLM's.
        rank: which.
        store: the path of a file that does not exist yet, where the ranks meet.
    """
    ranks = config.parallel_config.tensor_parallel_size
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        yield


def build(config: VllmConfig) -> nn.Module:
    """Return the model that serves, its weights being zeros."""
    with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        model = initialize_model(config)
        for tensor in model.parameters():
            tensor.data.zero_()
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model.eval()


def manifest_of(name: str) -> Manifest:
    """Return what a trainer sends for one of `CONFIGS`: the names and shapes of Hugging Face's checkpoints."""
    config = COMMON | CONFIGS[name]
    hidden, head, experts = config["hidden_size"], config["head_dim"], config.get("num_experts", 0)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{prefix}.self_attn.{part}_proj.weight"] = (count * head, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head)
        if experts:
            shapes |= {f"{prefix}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
            shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        inner = config["moe_intermediate_size" if experts else "intermediate_size"]
        for own in [f"experts.{expert}." for expert in range(experts)] or [""]:
            shapes |= {f"{prefix}.mlp.{own}{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
            shapes[f"{prefix}.mlp.{own}down_proj.weight"] = (hidden, inner)
        for part in ("input", "post_attention"):
            shapes[f"{prefix}.{part}_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return Manifest([ParamMeta(name, "bfloat16", shape) for name, shape in shapes.items()])


def weights_of(manifest: Manifest, seed: int) -> list[tuple[str, Tensor]]:
    """Return weights of normal numbers that depend on ``seed``, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (param.name, torch.empty(param.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        for param in manifest.params
    ]


def serving_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that a model serves with, by name.

    That is its weights, and, since kernels may read packed copies which no module shows, what its linear layers make of
    certain numbers.
    """
    found = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    found |= {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    for path, module in model.named_modules():
        multiply = getattr(module, "cpu_linear", None)
        columns = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", None))
        if multiply is not None and columns is not None:
            numbers = torch.linspace(-1, 1, 4 * columns).view(4, columns).bfloat16()
            found[f"{path}: product"] = multiply(numbers, module.weight, getattr(module, "bias", None)).clone()
    return found
