"""The model: the Llama architecture at two million parameters, its greedy generation and its fingerprint."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 96
"""Tokens of one training window."""


def make_model(seed: int) -> torch.nn.Module:
    """Return a model with random float32 weights that depend on ``seed`` alone; embedding and output are tied."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=256**-0.5,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = LlamaForCausalLM(config)
    return model.eval()


@torch.inference_mode()
def generate(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Return the ``count`` most likely tokens after ``prompt``, one by one, with a key-value cache."""
    tokens: list[int] = []
    ids, cache = torch.tensor([prompt]), None
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.append(int(ids))
    return tokens


def fingerprint(model: torch.nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and raw bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
