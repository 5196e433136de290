"""What ``benchmarks/nccl.py`` compares with: schemes that bring all weights over a communicator of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from weight_transfer.bench.schemes import Scheme, SchemeSide
from weight_transfer.limit import timed
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.limit import GroupLimit

GIB = 2**30
LONG = 600.0  # seconds


class GroupScheme(GroupLimit, Scheme):
    """All members call the same at the same time; the trainer is the root."""

    side: SchemeSide

    def run(self) -> tuple[float, float]:
        weights = list(self.side.process.weights().values())
        self._group.begin(Deadline(LONG)).wait()
        return timed(partial(self._bring, weights), self.side.device)

    def _bring(self, weights: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def _broadcast(self, data: torch.Tensor) -> Any:
        return self._group.broadcast([data], Deadline(LONG))


class PerTensor(GroupScheme):
    """One broadcast for each weight, from and into its own storage."""

    what = "one broadcast for each weight"

    def _bring(self, weights: Sequence[torch.Tensor]) -> None:
        for work in [self._broadcast(weight.view(-1).view(torch.uint8)) for weight in weights]:
            work.wait()


class Packed(GroupScheme):
    """Two buffers of 1 GiB: concatenate, broadcast, split, copy into the weights."""

    what = "broadcasts of weights that were packed into buffers of 1 GiB"

    def _bring(self, weights: Sequence[torch.Tensor]) -> None:
        device = self.side.device
        streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)]
        for index, chunk in enumerate(_chunks(weights, GIB)):
            with torch.cuda.stream(streams[index % 2]):
                views = [weight.view(-1).view(torch.uint8) for weight in chunk]
                sizes = [view.numel() for view in views]
                if self.side.is_trainer:
                    self._broadcast(torch.cat(views)).wait()
                else:
                    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
                    self._broadcast(buffer).wait()
                    for view, part in zip(views, buffer.split(sizes), strict=True):
                        view.copy_(part)


def _chunks(weights: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    total = 0
    for weight in weights:
        chunk.append(weight)
        total += weight.nbytes
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
