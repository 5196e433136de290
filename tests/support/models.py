"""Small models, of which one has everything that makes weights awkward, and configurations for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from weight_transfer.testing.models import digest, randomise

__all__ = ["CONTINUE", "LOOPBACK", "Odd", "Small", "digest", "model"]

LOOPBACK: dict[str, Any] = {"backend": "loopback", "timeout": 20, "init_timeout": 5}
CONTINUE = LOOPBACK | {"on_worker_failure": "continue"}


def model(value: float = 0.0) -> nn.Linear:
    """Return a layer of 4 by 4, of which every element has one value."""
    result = nn.Linear(4, 4)
    nn.init.constant_(result.weight, value)
    nn.init.constant_(result.bias, value)
    return result


class Odd(nn.Module):
    """Tied, transposed, empty, 0-d, bfloat16, float8, bool and integer weights, and one of several megabytes."""

    def __init__(self, seed: int, rows: int = 1024, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width, dtype=torch.bfloat16)
        self.head = nn.Linear(width, rows, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(4))
        self.transposed = nn.Parameter(torch.empty(48, width // 8).t())
        self.scale = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0, 7))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(33, dtype=torch.bool))
        self.register_buffer("quantised", torch.zeros(65, dtype=torch.float8_e4m3fn))
        self.register_buffer("cache", torch.zeros(5), persistent=False)
        self.randomise(seed)

    def randomise(self, seed: int) -> None:
        """Give every weight new bits."""
        randomise(self, seed)


class Small(Odd):
    """The same in a few kilobytes; some are larger than a bucket."""

    def __init__(self, seed: int, rows: int = 16) -> None:
        super().__init__(seed, rows, width=32)
