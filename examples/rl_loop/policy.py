"""A small decoder, and how it is sampled from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from task import DIGITS, LENGTH, VOCABULARY

WIDTH, LAYERS, HEADS = 192, 6, 6


class Block(nn.Module):
    """Attention, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        """Take and return float32 of shape ``[batch, length, WIDTH]``; ``kept`` has earlier tokens' keys and values."""
        batch, length, _ = hidden.shape
        parts = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, HEADS, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if kept:
            key, value = torch.cat([kept["key"], key], dim=2), torch.cat([kept["value"], value], dim=2)
        kept |= {"key": key, "value": value}
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        fed: torch.Tensor = self.down(functional.gelu(self.up(self.norm(hidden))))
        return hidden + fed


class Policy(nn.Module):
    """2.7 million parameters; the same class serves and learns."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor, kept: Sequence[dict[str, torch.Tensor]] | None = None) -> torch.Tensor:
        """Return the logits behind each token, float32 of shape ``[batch, length, VOCABULARY]``.

        Args:
            tokens: int64 of shape ``[batch, length]``.
            kept: what each block keeps of the tokens before these, a dict each; it is added to.
        """
        kept = kept or [{} for _ in self.blocks]
        before = kept[0]["key"].shape[2] if kept[0] else 0
        hidden = self.tokens(tokens) + self.positions.weight[before : before + tokens.shape[1]]
        for block, own in zip(self.blocks, kept, strict=True):
            hidden = block(hidden, own)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def logprobs(policy: Policy, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of the answers' tokens, of shape ``[batch, DIGITS]``."""
    logits: torch.Tensor = policy(torch.cat([prompts, answers[:, :-1]], dim=1))[:, -DIGITS:]
    return logits.log_softmax(dim=-1).gather(2, answers.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def sample(policy: Policy, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an answer for each prompt, and the logarithms of its tokens' probabilities; ``[batch, DIGITS]`` each."""
    kept: list[dict[str, torch.Tensor]] = [{} for _ in policy.blocks]
    token, answer, chosen = prompts, [], []
    for _ in range(DIGITS):
        likely = policy(token, kept)[:, -1].log_softmax(dim=-1)
        token = likely.exp().multinomial(1)
        answer.append(token)
        chosen.append(likely.gather(1, token))
    return torch.cat(answer, dim=1), torch.cat(chosen, dim=1)
