"""What the policy learns: to sort digits. Whether it has is for anybody to check, which is all that a reward needs."""

from __future__ import annotations

import torch

DIGITS = 5
"""How many digits a prompt has; the answer has as many."""
EQUALS = 10
"""The token between prompt and answer; the tokens below it are the digits."""
VOCABULARY = 11
LENGTH = 2 * DIGITS + 1


def make_prompts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return prompts, int64 of shape ``[count, DIGITS + 1]``."""
    digits = torch.randint(0, 10, (count, DIGITS), generator=generator)
    return torch.cat([digits, torch.full((count, 1), EQUALS)], dim=1)


def solutions(prompts: torch.Tensor) -> torch.Tensor:
    """Return the right answers, int64 of shape ``[count, DIGITS]``."""
    return prompts[:, :DIGITS].sort(dim=1).values


def rewards(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return 1 for each answer that is entirely right, else 0; float32 of shape ``[count]``."""
    return (answers == solutions(prompts)).all(dim=1).float()
