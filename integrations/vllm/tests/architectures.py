"""Small models of the architectures whose loaders are recorded: as checkpoints, and as vLLM's classes on two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
STATES = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")} | {
    "state_size": 8,
    "tie_word_embeddings": False,
}


@attrs.frozen
class Architecture:
    """A small model.

    Attributes:
        config: name of the transformers class of its configuration.
        model: name of the class that makes its checkpoint.
        values: of the configuration.
        expert_parallel: whether the two ranks share the experts out, and do not cut each.
        computed: what the names of parameters that cannot be recorded end with.
    """

    config: str
    model: str
    values: dict[str, Any]
    expert_parallel: bool = False
    computed: str | None = None

    def save(self, folder: Path) -> None:
        """Write a checkpoint of random weights in bfloat16."""
        import torch
        import transformers

        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**TOKENS, **self.values))
        model.to(torch.bfloat16).save_pretrained(folder)


def _of(name: str, **changed: Any) -> Architecture:
    return Architecture(f"{name}Config", f"{name}ForCausalLM", COMMON | changed)


ARCHITECTURES = {
    "Llama": _of("Llama"),
    "Qwen2": _of("Qwen2"),
    "Qwen3": _of("Qwen3"),
    "Qwen3, tied": _of("Qwen3", tie_word_embeddings=True),
    "Phi-3": _of("Phi3"),
    "Gemma-3": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM", COMMON | {"tie_word_embeddings": True}),
    "Mixtral": _of("Mixtral", num_local_experts=4),
    "Qwen3-MoE": _of("Qwen3Moe", **EXPERTS),
    "Qwen3-MoE, EP": attrs.evolve(_of("Qwen3Moe", **EXPERTS), expert_parallel=True),
    "DeepSeek-V3": Architecture(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", {k: v for k, v in (COMMON | LATENT).items() if k != "head_dim"}
    ),
    "DeepSeek-V3, EP": Architecture(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {k: v for k, v in (COMMON | LATENT).items() if k != "head_dim"},
        expert_parallel=True,
    ),
    "GPT-OSS": _of("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "Mamba": Architecture("MambaConfig", "MambaForCausalLM", STATES, computed=".mixer.A"),
    "Mamba-2": Architecture(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        STATES | {"num_heads": 8, "head_dim": 16, "n_groups": 2},
        computed=".mixer.A",
    ),
}


@contextmanager
def two_ranks(rank: int, meeting: Path) -> Iterator[None]:
    """Be one of two tensor-parallel ranks of vLLM.

    Args:
        rank: 0 or 1.
        meeting: a file over which they find each other; it must not exist.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(2, rank, f"file://{meeting}", rank, "gloo")
        parallel_state.initialize_model_parallel(2)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def vllm_model(folder: Path, device: str, *, expert_parallel: bool = False) -> Any:
    """Return vLLM's own model, as one of two ranks has it: in load format, with undefined weights or on ``meta``."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as experts
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # GPT-OSS has no kernels on CPUs. None are needed: the model only loads.
    experts.select_unquantized_moe_backend = lambda **_: (UnquantizedMoeBackend.CPU, None)
    config = EngineArgs(
        model=str(folder),
        tensor_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        distributed_executor_backend="mp",
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.device(device):
        return initialize_model(config)
