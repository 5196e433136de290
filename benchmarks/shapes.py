"""Shapes of real models, for benchmarks."""

from __future__ import annotations

import re
from typing import Any

from weight_transfer.bench.architectures import shapes_of
from weight_transfer.bench.configurations import model_shape


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    kind: str = "llama",
    **further: Any,
) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint shapes of a Llama-like model; ``kind`` and ``further`` are of its configuration."""
    return shapes_of(
        {
            "model_type": kind,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            **further,
        }
    )


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
    return llama(24, 896, 4864, 14, 2, 151936, kind="qwen2", tie_word_embeddings=True)


def tiny(count: int, nbytes: int) -> dict[str, tuple[int, ...]]:
    """Return ``count`` bfloat16 vectors of ``nbytes`` bytes each."""
    return {f"experts.{index}.bias": (nbytes // 2,) for index in range(count)}


def llama_8b() -> dict[str, tuple[int, ...]]:
    """Llama-3.1-8B: 291 tensors, 16.06 GB in bfloat16."""
    return model_shape("llama-3.1-8b").shapes


def qwen_moe(layers: int = 24) -> dict[str, tuple[int, ...]]:
    """Qwen3-30B-A3B cut to 24 layers: 9,435 tensors, 31.15 GB in bfloat16."""
    return model_shape("qwen3-30b-a3b", layers).shapes


def small_moe() -> dict[str, tuple[int, ...]]:
    """A mixture of experts for CPUs: 1,209 tensors, 0.38 GB in bfloat16."""
    experts = {"num_experts": 64, "moe_intermediate_size": 256}
    return llama(6, 512, 0, 8, 2, 32000, kind="qwen3_moe", head_dim=128, **experts)


def toy() -> dict[str, tuple[int, ...]]:
    """Two layers that show whether something runs: 21 tensors, 8.0 MB in bfloat16."""
    return llama(2, 256, 1024, 8, 2, 4096)


def toy_moe() -> dict[str, tuple[int, ...]]:
    """One layer with eight experts, for the same: 36 tensors, 6.1 MB in bfloat16."""
    return llama(1, 256, 0, 8, 2, 4096, kind="qwen3_moe", num_experts=8, moe_intermediate_size=128)


def qwen3_235b() -> dict[str, tuple[int, ...]]:
    """Qwen3-235B-A22B: 36,945 tensors, 470.2 GB in bfloat16."""
    experts = {"num_experts": 128, "moe_intermediate_size": 1536}
    return llama(94, 4096, 0, 64, 4, 151936, kind="qwen3_moe", head_dim=128, **experts)


def kimi_k2() -> dict[str, tuple[int, ...]]:
    """Kimi-K2: 69,975 tensors, 2.053 TB in bfloat16."""
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128}
    latent |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 384, "n_shared_experts": 1, "moe_intermediate_size": 2048}
    return llama(61, 7168, 18432, 64, 64, 163840, kind="kimi_k2", first_k_dense_replace=1, **latent, **experts)
