"""The trainer of ``benchmarks/cast.py``: that of ``weight-transfer bench``, with fp32 masters of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from cast_members import WithRouters, masters
from torch import nn

from weight_transfer.bench import trainer
from weight_transfer.bench.member import Scene, Tree
from weight_transfer.limit import Limit, settle, timed

if TYPE_CHECKING:
    from weight_transfer.bench.schemes import SchemeSide
    from weight_transfer.testing.actors import Stage


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    Trainer(Scene.of(scene), number).perform(stage)


class Trainer(WithRouters, trainer.Trainer):
    """A trainer that holds masters, and a twin of what the worker should have, made with ``tensor.to``."""

    def enter(self) -> None:
        super().enter()
        self.masters = Tree()
        for name, shape in self.parts.shapes.items():
            master = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.masters.plant(name, nn.Parameter(master, requires_grad=False))

    def fill(self, seed: int) -> None:
        own = dict(self.masters.named_parameters())
        twins = self.weights()
        for name, master in masters(self.parts.shapes, seed, self.device):
            own[name].data.copy_(master)
            twins[name].copy_(master.to(twins[name].dtype))
        settle(self.device)

    def send(self, way: str) -> dict[str, Any]:
        return self._send(way, self.masters if way == "cast" else self.model)


class CastAlone(Limit):
    """The cast alone, into new tensors, one after another, on the trainer's device."""

    side: SchemeSide
    what = "the cast alone"

    def join(self, offers: Sequence[Any]) -> None:
        self._casts: list[tuple[torch.Tensor, torch.dtype]] = []
        if self.side.is_trainer:
            trainer = self.side.process
            own = trainer.masters.named_parameters()
            self._casts = [(master.detach(), trainer.dtype(name)) for name, master in own]

    def run(self) -> tuple[float, float]:
        return timed(self._cast, self.side.device) if self.side.is_trainer else (0.0, 0.0)

    def _cast(self) -> None:
        for master, dtype in self._casts:
            master.to(dtype)

    def close(self) -> None:
        self._casts = []
