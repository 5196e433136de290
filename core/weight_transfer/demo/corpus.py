"""Six sonnets of Shakespeare (1609, in modern spelling; public domain), as bytes: the vocabulary has 256 tokens.

Six, because that much a model of two million parameters can learn in 120 steps so well that one sees it.
"""

from __future__ import annotations

from importlib.resources import files

import torch

PROMPTS = (
    "Shall I compare thee to a summer's day?",
    "Let me not to the marriage of true minds",
    "That time of year thou mayst in me behold",
    "My mistress' eyes are nothing like the sun;",
)
"""What the workers continue: worker 0 the first one, and so on, round and round."""


def corpus() -> torch.Tensor:
    """Return the text as an int64 tensor of byte values."""
    data = files("weight_transfer.demo").joinpath("sonnets.txt").read_bytes()
    return torch.tensor(list(data), dtype=torch.int64)


def prompt_of(index: int) -> str:
    """Return the prompt of the worker with this index."""
    return PROMPTS[index % len(PROMPTS)]


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    """Return text that a terminal can show: bytes other than printable ASCII and newlines become dots."""
    return "".join(chr(token) if token == 10 or 32 <= token < 127 else "·" for token in tokens)
