"""A trainer process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

import weight_transfer as wt
from support.models import Odd, digest
from support.worker import shared_mappings

if TYPE_CHECKING:
    from support.actors import Stage


def main(
    stage: Stage,
    config: dict[str, Any],
    workers: list[str],
    rows: int = 1024,
    device: str = "cpu",
    environ: dict[str, str] | None = None,
) -> None:
    os.environ.update(environ or {})
    torch.set_num_threads(1)
    model = Odd(seed=0, rows=rows).to(device)
    with wt.WeightSender(config, workers) as sender:

        def send(seed: int, version: int | None) -> dict[str, Any]:
            model.randomise(seed)
            try:
                report = sender.send(model, version=version)
            except KeyboardInterrupt as interrupt:
                raise RuntimeError("KeyboardInterrupt") from interrupt
            sent = digest(model)
            model.randomise(999)  # the source may change as soon as send returns
            return {
                "digest": sent,
                "version": report.version,
                "workers": report.workers,
                "lost": report.lost,
                "transports": report.transports,
                "warnings": report.warnings,
            }

        def reallocate() -> None:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

        stage.say(os.getpid())
        stage.serve(
            {
                "send": send,
                "add_worker": sender.add_worker,
                "remove_worker": sender.remove_worker,
                "fds": lambda: len(os.listdir("/proc/self/fd")),
                "maps": shared_mappings,
                "reallocate": reallocate,
                "close": sender.close,
            }
        )
