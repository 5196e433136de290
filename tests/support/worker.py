"""A worker process: serves a receiver over HTTP. Its loader can be told to stop and wait in the middle of an update."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.testing.worker import Loader

if TYPE_CHECKING:
    from support.actors import Stage


class Unjoinable(wt.WeightReceiver):
    """Answers, but can never join."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        raise RuntimeError("this worker was told not to join")


def main(
    stage: Stage,
    seed: int,
    config: dict[str, Any],
    port: int = 0,
    in_place: bool = False,
    rows: int = 1024,
    breaks_at_init: bool = False,
    device: str = "cpu",
) -> None:
    torch.set_num_threads(1)
    model = Odd(seed, rows).to(device)
    loader = Loader(model, stage)
    load_weights = None if in_place else loader
    kind = Unjoinable if breaks_at_init else wt.WeightReceiver
    with (
        kind(config, model, load_weights=load_weights) as receiver,
        wt.serve(receiver, port=port) as server,
    ):
        stage.say(server.url)
        stage.serve(
            {
                "digest": lambda: digest(model),
                "status": receiver.status,
                "arm": loader.arm,
                "release": loader.release,
                "calls": lambda: loader.calls,
                "maps": shared_mappings,
            }
        )


def shared_mappings() -> int:
    """Return how many of the ipc backend's segments this process maps."""
    return Path("/proc/self/maps").read_text().count("memfd:weight-transfer")
