"""Makes tiny random checkpoints: of each architecture two, ``-a`` and ``-b``, of the same shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

SHAPES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}

for kind in ("Llama", "Qwen2", "Qwen3"):
    config = getattr(transformers, f"{kind}Config")(**SHAPES)
    for seed, letter in enumerate("ab"):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
        model.save_pretrained(Path(sys.argv[1], f"{kind.lower()}-{letter}"))
