"""Shapes of real models, for benchmarks: modules without a forward pass, filled with random bits."""

from __future__ import annotations

import re

import torch
from torch import nn


class Weights(nn.Module):
    """A bag of parameters, by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name.replace(".", "/"), parameter)

    def randomise(self, seed: int) -> None:
        """Fill every parameter with normal numbers that depend on ``seed``."""
        generator = torch.Generator(next(self.parameters()).device).manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    tied: bool = False,
    bias: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint shapes of a Llama-like model (with ``bias`` on q, k and v: Qwen2)."""
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def first_layers(shapes: dict[str, tuple[int, ...]], count: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes without those of layers from ``count`` on; all for None."""
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in shapes}
    return {
        name: shape
        for name, shape in shapes.items()
        if count is None or (number := numbers[name]) is None or int(number[1]) < count
    }


def qwen_half_billion() -> dict[str, tuple[int, ...]]:
    """Qwen2.5-0.5B: 290 tensors, 0.99 GB in bfloat16."""
    return llama(24, 896, 4864, 14, 2, 151936, tied=True, bias=True)


def tiny(count: int, nbytes: int) -> dict[str, tuple[int, ...]]:
    """Return ``count`` bfloat16 vectors of ``nbytes`` bytes each."""
    return {f"experts.{index}.bias": (nbytes // 2,) for index in range(count)}


def llama_8b() -> dict[str, tuple[int, ...]]:
    """Llama-3.1-8B: 291 tensors, 16.06 GB in bfloat16."""
    return llama(32, 4096, 14336, 32, 8, 128256)


def qwen_moe(layers: int = 24) -> dict[str, tuple[int, ...]]:
    """Qwen3-30B-A3B cut to 24 layers: 9,435 tensors, 31.15 GB in bfloat16."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 2048)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, 2048)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (2048, 4096)
        for name in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (128,)
        for expert in range(128):
            for name in ("gate", "up"):
                shapes[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = (768, 2048)
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (2048, 768)
        shapes[f"{prefix}.mlp.gate.weight"] = (128, 2048)
        shapes[f"{prefix}.input_layernorm.weight"] = (2048,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (2048,)
    shapes["model.norm.weight"] = (2048,)
    shapes["lm_head.weight"] = (151936, 2048)
    return shapes


def small_moe() -> dict[str, tuple[int, ...]]:
    """A mixture of experts for CPUs: 1,197 tensors, 0.38 GB in bfloat16."""
    hidden, experts = 512, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for layer in range(6):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 1024), ("k", 256), ("v", 256)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, 1024)
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        shapes |= routed(f"{prefix}.mlp", experts, hidden, 256) | norms(prefix, hidden)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}


def toy() -> dict[str, tuple[int, ...]]:
    """Two layers that show whether something runs: 21 tensors, 8.0 MB in bfloat16."""
    return llama(2, 256, 1024, 8, 2, 4096)


def toy_moe() -> dict[str, tuple[int, ...]]:
    """One layer with eight experts besides, for the same: 36 tensors, 7.7 MB in bfloat16."""
    return llama(1, 256, 1024, 8, 2, 4096) | routed("model.layers.0.mlp", 8, 256, 128)


def qwen3_235b() -> dict[str, tuple[int, ...]]:
    """Qwen3-235B-A22B: 36,945 tensors, 470.2 GB in bfloat16."""
    hidden, head, experts = 4096, 128, 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, hidden)}
    for layer in range(94):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 64 * head), ("k", 4 * head), ("v", 4 * head)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, 64 * head)
        for name in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (head,)
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        shapes |= routed(f"{prefix}.mlp", experts, hidden, 1536) | norms(prefix, hidden)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (151936, hidden)}


def kimi_k2() -> dict[str, tuple[int, ...]]:
    """Kimi-K2: 69,975 tensors, 2.053 TB in bfloat16."""
    hidden, heads, experts, rope = 7168, 64, 384, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (163840, hidden)}
    for layer in range(61):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_a_proj.weight": (1536, hidden),
            f"{prefix}.self_attn.q_a_layernorm.weight": (1536,),
            f"{prefix}.self_attn.q_b_proj.weight": (heads * (128 + rope), 1536),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (512 + rope, hidden),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (512,),
            f"{prefix}.self_attn.kv_b_proj.weight": (heads * (128 + 128), 512),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * 128),
        }
        shapes |= norms(prefix, hidden)
        if layer == 0:
            shapes |= gated(f"{prefix}.mlp", hidden, 18432)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (experts,)
        shapes |= routed(f"{prefix}.mlp", experts, hidden, 2048) | gated(f"{prefix}.mlp.shared_experts", hidden, 2048)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (163840, hidden)}


def gated(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a gated feed-forward block."""
    up, down = (intermediate, hidden), (hidden, intermediate)
    return {f"{prefix}.{name}_proj.weight": down if name == "down" else up for name in ("gate", "up", "down")}


def routed(prefix: str, experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's routed experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(experts):
        shapes |= gated(f"{prefix}.experts.{expert}", hidden, intermediate)
    return shapes


def norms(prefix: str, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's two norms."""
    return {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
