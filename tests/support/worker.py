"""A worker process: serves a receiver over HTTP. Its loader can be told to stop and wait in the middle of an update."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.control import LocalChannel
from weight_transfer.testing.worker import Loader

if TYPE_CHECKING:
    from support.actors import Stage


class Unjoinable(wt.WeightReceiver):
    """Answers, but can never join."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("this worker was told not to join")


def main(
    stage: Stage,
    seed: int,
    config: dict[str, Any],
    port: int = 0,
    listen: str = "127.0.0.1",
    in_place: bool = False,
    rows: int = 1024,
    breaks_at_init: bool = False,
    device: str = "cpu",
    replica: int = 1,
    environ: dict[str, str] | None = None,
) -> None:
    """Serve ``replica`` receivers behind one address; the first one's loader takes orders."""
    os.environ.update(environ or {})
    torch.set_num_threads(1)
    models = [Odd(seed + rank, rows).to(device) for rank in range(replica)]
    loader = Loader(models[0], stage)
    loaders = [loader, *(Loader(model, stage) for model in models[1:])]
    kind = Unjoinable if breaks_at_init else wt.WeightReceiver
    with ExitStack() as stack:
        receivers = [
            stack.enter_context(
                kind(
                    config,
                    model,
                    parallel_config=wt.ParallelConfig(rank=rank, world_size=replica, device=device),
                    load_weights=None if in_place else loaders[rank],
                )
            )
            for rank, model in enumerate(models)
        ]
        channel = receivers[0] if replica == 1 else LocalChannel(*receivers)
        server = stack.enter_context(wt.serve(channel, host=listen, port=port))
        sampling = stack.enter_context(ExitStack())
        stage.say(server.url)
        stage.serve(
            {
                "digest": lambda: digest(models[0]),
                "digests": lambda: [digest(model) for model in models],
                "status": channel.status,
                "arm": loader.arm,
                "release": loader.release,
                "calls": lambda: loader.calls,
                "busy": lambda: receivers[0]._lifecycle.busy,
                "hold": lambda: sampling.enter_context(receivers[0].serving(5)),
                "let_go": sampling.close,
                "maps": shared_mappings,
                "fds": lambda: len(os.listdir("/proc/self/fd")),
                "mapped": lambda: mapped_device_memory(receivers[0]),
                "free": lambda: torch.cuda.mem_get_info(device)[0],
                "pid": os.getpid,
                "peek": lambda: [int(_bytes(models[0].embed.weight)[at]) for at in (0, -1)],
                "fill": lambda value: [_bytes(weight).fill_(value) for weight in (models[0].embed.weight,)] and None,
            }
        )


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(-1).view(torch.uint8)


def shared_mappings() -> int:
    """Return how many of the ipc backend's segments this process maps."""
    return Path("/proc/self/maps").read_text().count("memfd:weight-transfer")


def mapped_device_memory(receiver: wt.WeightReceiver) -> int:
    """Return how many of the trainer's allocations the ipc backend's worker maps."""
    engine = getattr(receiver._joined, "engine", None)
    return engine.mapped_allocations if engine is not None else 0
