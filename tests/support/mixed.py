"""A model whose trainer keeps fp32 masters, and whose server has bfloat16 weights and fp32 routers."""

from __future__ import annotations

import torch
from torch import nn

MIXED = {"*": "bfloat16", "*.router.*": "float32"}
"""The cast from one to the other."""


class Mixed(nn.Module):
    """Large, small, empty and 0-d weights, transposed ones, and some that are no floats."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(1500, 64, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(64, 257, dtype=dtype),
                    "norm": nn.LayerNorm(64, dtype=dtype),
                    "router": nn.Linear(64, 8, dtype=torch.float32),
                }
            )
            for _ in range(3)
        )
        self.turned = nn.Parameter(torch.empty(48, 32, dtype=dtype).t())
        self.scale = nn.Parameter(torch.empty((), dtype=dtype))
        self.empty = nn.Parameter(torch.empty(0, 7, dtype=dtype))
        self.register_buffer("steps", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(33, dtype=torch.bool))


def served(model: Mixed) -> Mixed:
    """Return what a server should have: each weight of the masters by ``tensor.to`` of the server's dtype."""
    server = Mixed(torch.bfloat16).to(model.scale.device)
    for (_, mine), (_, theirs) in zip(_weights(server), _weights(model), strict=True):
        mine.data = theirs.detach().to(mine.dtype)
    return server


def _weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
