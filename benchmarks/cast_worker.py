"""The worker of ``benchmarks/cast.py``: that of ``weight-transfer bench``, which expects what masters become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from cast_members import WithRouters, masters

from weight_transfer.bench import worker
from weight_transfer.bench.member import Scene

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage

_INTEGERS = {2: torch.int16, 4: torch.int32}


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    Worker(Scene.of(scene), number).perform(stage)


class Worker(WithRouters, worker.Worker):
    """A worker whose bits are compared with those of ``tensor.to``."""

    def wrong(self, seed: int) -> int:
        weights = self.weights()
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for name, master in masters(self.parts.shapes, seed, self.device):
            own = weights[name]
            bits = _INTEGERS[own.itemsize]
            count += (own.view(bits) != master.to(own.dtype).view(bits)).sum()
        return int(count)
