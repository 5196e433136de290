"""Which versions of vLLM are known to work, and what is used of them that they do not promise."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import version  # noqa: TID251  (nothing else of it is needed)

import weight_transfer as wt

OLDEST, NEWEST = (0, 33), (0, 33)
"""The first and the last minor version with which the tests were run."""

USED = {
    "vllm.distributed.weight_transfer": ("WeightTransferEngineFactory",),
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory": ("_registry", "register_engine"),
    "vllm.distributed.weight_transfer.base": (
        "WeightTransferEngine",
        "WeightTransferInitInfo",
        "WeightTransferUpdateInfo",
    ),
    "vllm.distributed.weight_transfer.base:WeightTransferEngine": (
        "set_weight_update_target",
        "reset_weight_update_target",
    ),
    "vllm.distributed.parallel_state": ("get_tp_group", "get_pp_group"),
    "vllm.model_executor.layers.attention": ("Attention", "is_deferred_attention_layer"),
    "vllm.model_executor.layers.layernorm": ("RMSNorm",),
    "vllm.model_executor.layers.linear": ("LinearBase", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("UnquantizedEmbeddingMethod", "VocabParallelEmbedding"),
    "vllm.model_executor.model_loader.mtp_validation": ("disable_mtp_completeness_check",),
    "vllm.model_executor.model_loader.reload": ("finalize_layerwise_reload", "initialize_layerwise_reload"),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "LAYERWISE_INFO",
        "_get_original_loader",
        "_layerwise_process",
        "_place_kernel_tensors",
    ),
    "vllm.model_executor.model_loader.reload.meta": ("SKIP_LOAD_TENSORS", "materialize_layer"),
    "vllm.model_executor.model_loader.reload.utils": ("get_layer_tensors",),
    "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo": ("can_load", "reset"),
}
"""Names by module, or by class of a module."""


def require_vllm() -> None:
    """Raise unless the installed vLLM is one of the versions that are known to work.

    Raises:
        ConfigError: it is another one.
    """
    installed = version("vllm")
    match = re.match(r"(\d+)\.(\d+)", installed)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not OLDEST <= found <= NEWEST:
        raise wt.ConfigError(
            f"weight-transfer-vllm works with vLLM {_text(OLDEST)} to {_text(NEWEST)}, and vLLM {installed} is "
            f"installed; upgrade {'vLLM' if found < OLDEST else 'weight-transfer-vllm, or install an older vLLM'}."
        )


def missing() -> list[str]:
    """Return what this vLLM lacks of `USED`."""
    lacking = []
    for place, names in USED.items():
        module, _, owner = place.partition(":")
        try:
            where: object = importlib.import_module(module)
        except ImportError:
            lacking.append(module)
            continue
        where = getattr(where, owner, None) if owner else where
        lacking += [f"{place}.{name}" for name in names if not hasattr(where, name)]
    return lacking


def _text(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"
