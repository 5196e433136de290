"""What the processes of ``benchmarks/cast.py`` have in common: masters, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from weight_transfer.bench.member import Member

Shape = tuple[int, ...]


class WithRouters(Member):
    """A process whose weights are bf16, but for routers, which are fp32."""

    @staticmethod
    def dtype(name: str) -> torch.dtype:
        return torch.float32 if "router" in name else torch.bfloat16


def masters(shapes: Mapping[str, Shape], seed: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the fp32 masters of a version: normal numbers, the same in each process."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        yield name, torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
