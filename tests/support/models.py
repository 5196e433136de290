"""Small models with everything that makes weights awkward."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


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
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.state_dict().values():
                size = (weight.numel() * weight.element_size(),)
                noise = torch.randint(
                    0, 2 if weight.dtype is torch.bool else 120, size, dtype=torch.uint8, generator=generator
                )
                weight.copy_(noise.view(weight.dtype).view(weight.shape))


def digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes of all persistent weights."""
    result = hashlib.sha256()
    for name, weight in model.state_dict().items():
        result.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        result.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
