"""A trainer process with fp32 masters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import weight_transfer as wt
from support.mixed import Mixed, served
from weight_transfer.testing.models import digest, randomise

if TYPE_CHECKING:
    from support.actors import Stage


def main(stage: Stage, config: dict[str, Any], workers: list[str], device: str = "cpu") -> None:
    torch.set_num_threads(1)
    model = Mixed(torch.float32).to(device)
    with wt.WeightSender(config, workers) as sender:

        def send(seed: int, version: int) -> dict[str, Any]:
            randomise(model, seed)
            report = sender.send(model, version=version)
            sent = digest(served(model))
            randomise(model, 999)  # the masters may change as soon as send returns
            return {"digest": sent, "nbytes": report.nbytes}

        stage.say(None)
        stage.serve({"send": send})
