"""The model that is served, and its tokenizer if there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from weight_transfer.errors import ConfigError

UNFINISHED = "\ufffd"
"""What bytes are decoded to that are no character, or none yet."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@attrs.frozen(kw_only=True, eq=False)
class Hosted:
    """A causal language model.

    Attributes:
        name: how requests call it.
        model: of transformers.
        tokenizer: None if its folder has none; then prompts are token ids, and answers have no text.
        trained: whether it has weights from a checkpoint; else they are random.
        context: tokens that a prompt and its continuation may have together.
    """

    name: str
    model: Any
    tokenizer: Any
    trained: bool
    context: int
    _spelled: dict[int, str | None] = attrs.field(factory=dict, init=False)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or [])

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; empty without a tokenizer."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if self.tokenizer is not None else ""

    def spell(self, token: int) -> str | None:
        """Return what a token says by itself; None if it is a part of a character, or there is no tokenizer."""
        if token not in self._spelled:
            text = str(self.tokenizer.decode([token])) if self.tokenizer is not None else UNFINISHED
            self._spelled[token] = None if UNFINISHED in text else text
        return self._spelled[token]


def host(path: Path, device: str, name: str | None = None) -> Hosted:
    """Load a model in the dtype of its files.

    Args:
        path: a folder with ``config.json`` and safetensors files; or a ``config.json``, for random weights.
        device: torch device.
        name: default is the folder's.

    Raises:
        ConfigError: transformers cannot load it, or a folder has no weights or lacks some.
    """
    trained = path.is_dir()
    folder = path if trained else path.parent
    if trained and not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} holds no safetensors file; name its config.json to begin with random weights.")
    try:
        config = AutoConfig.from_pretrained(path)
        model: Any
        if trained:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
            model, told = loaded
            lacking = sorted(told["missing_keys"])
        else:
            lacking = []
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except Exception as error:  # whatever is damaged, in whatever library
        raise ConfigError(
            f"{path}: transformers cannot load a causal language model from it.", cause=str(error)
        ) from error
    if lacking:  # transformers would go on with random ones
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ConfigError(f"{folder} lacks {lacking[0]!r}{others}; complete the checkpoint.")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Hosted(
        name=name or Path(os.path.abspath(folder)).name,  # as it is called, be it a link
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        trained=trained,
        context=context or int(1e9),
    )
