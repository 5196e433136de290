"""What ``benchmarks/nccl.py`` compares with: schemes that bring all weights over the communicator that they are given.

All members call one at the same time; the trainer is the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.limit import broadcast_again

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer_nccl.group import Group

GIB = 2**30


def broadcast(group: Group, data: torch.Tensor) -> Any:
    return group.broadcast([data], Deadline(600))


def limit(group: Group, weights: nn.Module, _root: bool) -> None:
    nbytes = sum(parameter.nbytes for parameter in weights.parameters())
    size = min(GIB, nbytes) if group.device.type == "cuda" else nbytes
    broadcast_again(group, _buffer(group.device, size), nbytes)


@cache
def _buffer(device: torch.device, size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8, device=device)


def per_tensor(group: Group, weights: nn.Module, _root: bool) -> None:
    works = [broadcast(group, parameter.data.view(-1).view(torch.uint8)) for parameter in weights.parameters()]
    for work in works:
        work.wait()


def packed(group: Group, weights: nn.Module, root: bool) -> None:
    streams = [torch.cuda.Stream(group.device) if group.device.type == "cuda" else None for _ in range(2)]
    for index, chunk in enumerate(_chunks(weights, GIB)):
        with torch.cuda.stream(streams[index % 2]):
            views = [parameter.data.view(-1).view(torch.uint8) for parameter in chunk]
            sizes = [view.numel() for view in views]
            if root:
                broadcast(group, torch.cat(views)).wait()
            else:
                buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=group.device)
                broadcast(group, buffer).wait()
                for view, part in zip(views, buffer.split(sizes), strict=True):
                    view.copy_(part)


def _chunks(weights: nn.Module, size: int) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    total = 0
    for parameter in weights.parameters():
        chunk.append(parameter)
        total += parameter.nbytes
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


BASELINES: dict[str, Callable[[Group, nn.Module, bool], None]] = {
    "limit": limit,
    "per tensor": per_tensor,
    "packed": packed,
}
