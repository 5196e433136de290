"""Models that weights are loaded into, and what loads them in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from weight_transfer import CheckpointFormatLoader, KernelFormatLoader, Manifest, ModuleSource, ParamMeta
from weight_transfer.model.manifest import dtype_name
from weight_transfer.plan.buckets import as_bytes

if TYPE_CHECKING:
    from weight_transfer.model.loading import Weights


class Model(nn.Module):
    """A model of several dtypes, with tied weights and buffers of both kinds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("rotary", torch.randn(3), persistent=False)


def manifest_of(weights: Weights) -> Manifest:
    return Manifest(ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in weights)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: as_bytes(tensor.contiguous()).clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.down = nn.Linear(5, 3)


class Stack(nn.Module):
    def __init__(self, depth: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(4, 3)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(3)


def sent_by(model: nn.Module) -> tuple[Manifest, Weights]:
    source = ModuleSource(model)
    return source.manifest(), [(name, tensor.clone()) for name, tensor in source]


def weights_of(model: nn.Module) -> Weights:
    return sent_by(model)[1]


def load_in_parts(loader: KernelFormatLoader | CheckpointFormatLoader, weights: Weights, size: int) -> None:
    loader.begin(manifest_of(weights))
    for first in range(0, len(weights), size):
        loader(weights[first : first + size])
    loader.finish()
