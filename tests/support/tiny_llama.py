"""A causal language model of a few thousand weights with a tokenizer and a chat template, in Hugging Face's format."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_END = len(_BYTES)
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, and one that ends a text."""
    vocabulary = {byte: index for index, byte in enumerate(_BYTES)} | {"<end>": _END}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", chat_template=_TEMPLATE)


def model(seed: int) -> Any:
    """Return a model with float32 weights that depend on the seed alone, and give each token another successor."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=_END,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, seed: int) -> Path:
    """Write model and tokenizer."""
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
@torch.inference_mode()
def expected(seed: int, prompt: str, count: int) -> list[int]:
    """Return what transformers' own generation continues a prompt with, always by the most likely token."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    tokens: list[int] = model(seed).generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=_END)[0].tolist()
    return tokens[ids.shape[1] :]
