"""From a model's configuration to the names and shapes of its weights, as its published checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weight_transfer.errors import ConfigError

Config = Mapping[str, Any]
"""The fields of a Hugging Face ``config.json``."""
Shapes = dict[str, tuple[int, ...]]

DTYPE = "bfloat16"
"""Of all weights, whatever the configuration says."""
ITEMSIZE = 2  # bytes

_AT_LEAST = {
    "num_hidden_layers": 1,
    "hidden_size": 1,
    "intermediate_size": 0,
    "vocab_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "num_experts": 0,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "moe_intermediate_size": 0,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 1,
    "kv_lora_rank": 1,
    "qk_rope_head_dim": 1,
    "qk_nope_head_dim": 1,
    "v_head_dim": 1,
}
"""The numbers that are read of a configuration, if it has them."""
_MOST_TENSORS = 1_000_000


def shapes_of(config: Config) -> Shapes:
    """Return the shapes of a causal language model's weights by their names, in order.

    Raises:
        ConfigError: the architecture is not known, a field is missing or is none of what it has to be, or there are
            too many weights.
    """
    config = {name: value for name, value in config.items() if value is not None}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ATTENTION:
        known = ", ".join(sorted(_ATTENTION))
        raise ConfigError(f"model_type {kind!r} of the configuration is not known to bench; it knows {known}.")
    for name, least in _AT_LEAST.items():
        value = config.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} of the configuration must be a whole number from {least} on, got {value!r}.")
    if not isinstance(config.get("mlp_only_layers", []), list):
        raise ConfigError(f"mlp_only_layers of the configuration must be a list, got {config['mlp_only_layers']!r}.")
    experts = config.get("n_routed_experts", config.get("num_experts", 0))
    if config.get("num_hidden_layers", 1) * (1 + experts) > _MOST_TENSORS:
        raise ConfigError(f"The configuration has more than {_MOST_TENSORS:,} experts in all; give fewer --layers.")
    try:
        return _shapes(config, _ATTENTION[kind])
    except KeyError as error:
        raise ConfigError(f"The configuration lacks {error.args[0]!r}, which a {kind} model has.") from error


def _shapes(config: Config, attention: Callable[[str, Config], Shapes]) -> Shapes:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= attention(f"{prefix}.self_attn", config)
        shapes |= _feed_forward(f"{prefix}.mlp", layer, config)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _grouped(prefix: str, config: Config, *, has_bias: bool = False, has_norms: bool = False) -> Shapes:
    """Return the shapes of attention with grouped queries."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or max(1, hidden // heads)
    groups = config.get("num_key_value_heads", heads)
    rows = {"q": heads * head, "k": groups * head, "v": groups * head}
    shapes: Shapes = {}
    for name, count in rows.items():
        shapes[f"{prefix}.{name}_proj.weight"] = (count, hidden)
        if has_bias or config.get("attention_bias", False):
            shapes[f"{prefix}.{name}_proj.bias"] = (count,)
    shapes[f"{prefix}.o_proj.weight"] = (hidden, heads * head)
    if config.get("attention_bias", False) and not has_bias:
        shapes[f"{prefix}.o_proj.bias"] = (hidden,)
    if has_norms:
        shapes |= {f"{prefix}.{name}_norm.weight": (head,) for name in ("q", "k")}
    return shapes


def _qwen2(prefix: str, config: Config) -> Shapes:
    return _grouped(prefix, config, has_bias=True)


def _qwen3(prefix: str, config: Config) -> Shapes:
    return _grouped(prefix, config, has_norms=True)


def _latent(prefix: str, config: Config) -> Shapes:
    """Return the shapes of DeepSeek's multi-head latent attention."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = (config[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    queries = config.get("q_lora_rank")
    shapes: Shapes = {}
    if queries is None:
        shapes[f"{prefix}.q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes[f"{prefix}.q_a_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (queries,)
        shapes[f"{prefix}.q_b_proj.weight"] = (heads * (nope + rope), queries)
    return shapes | {
        f"{prefix}.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        f"{prefix}.kv_a_layernorm.weight": (latent,),
        f"{prefix}.kv_b_proj.weight": (heads * (nope + value), latent),
        f"{prefix}.o_proj.weight": (hidden, heads * value),
    }


_ATTENTION: Mapping[Any, Callable[[str, Config], Shapes]] = {
    "deepseek_v3": _latent,
    "kimi_k2": _latent,
    "llama": _grouped,
    "mistral": _grouped,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3,
}
_SHARES_EXPERTS = ("deepseek_v3", "kimi_k2")
"""Those in which some experts are for all tokens."""


def _feed_forward(prefix: str, layer: int, config: Config) -> Shapes:
    hidden = config["hidden_size"]
    if not _has_experts(layer, config):
        return _gated(prefix, hidden, config["intermediate_size"])
    inner, shares = config["moe_intermediate_size"], config["model_type"] in _SHARES_EXPERTS
    experts = config["n_routed_experts" if shares else "num_experts"]
    shapes: Shapes = {f"{prefix}.gate.weight": (experts, hidden)}
    if shares:
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (experts,)
        shapes |= _gated(f"{prefix}.shared_experts", hidden, config["n_shared_experts"] * inner)
    for expert in range(experts):
        shapes |= _gated(f"{prefix}.experts.{expert}", hidden, inner)
    return shapes


def _has_experts(layer: int, config: Config) -> bool:
    if config["model_type"] in _SHARES_EXPERTS:
        return layer >= int(config["first_k_dense_replace"])
    is_sparse = (layer + 1) % int(config.get("decoder_sparse_step", 1)) == 0
    return config["model_type"] == "qwen3_moe" and is_sparse and layer not in config.get("mlp_only_layers", ())


def _gated(prefix: str, hidden: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    return shapes | {f"{prefix}.down_proj.weight": (hidden, inner)}
