"""One rank of a trainer whose parameters are sharded with FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import weight_transfer as wt

if TYPE_CHECKING:
    from support.actors import Stage


def main(
    stage: Stage,
    rank: int,
    world_size: int,
    store: str,
    config: dict[str, Any],
    workers: list[str],
    told: bool = True,
    sharded: bool = True,
) -> None:
    """Args beside the actor's own: ``told``: the sender is told its rank; ``sharded``: else each has a replica."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 17))
        if sharded:
            fully_shard(model)
        parallel = wt.ParallelConfig(rank=rank, world_size=world_size) if told else None
        with wt.WeightSender(config, workers, parallel_config=parallel) as sender:

            def fill(seed: int) -> list[list[float]]:
                filled = []
                for index, parameter in enumerate(model.parameters()):
                    generator = torch.Generator().manual_seed(seed * 100 + index)
                    full = torch.randn(parameter.shape, generator=generator)
                    values = full
                    if sharded:
                        assert isinstance(parameter, DTensor)
                        values = distribute_tensor(full, parameter.device_mesh, parameter.placements)
                    with torch.no_grad():
                        parameter.copy_(values)
                    filled.append(full.flatten().tolist())
                return filled

            def send(seed: int, version: int | None = None) -> list[list[float]]:
                sent = fill(seed)
                sender.send(model, version=version)
                return sent

            def send_to(seed: int, worker: str) -> list[list[float]]:
                sent = fill(seed)
                with wt.WeightSender(config, [worker]) as other:
                    other.send(model)
                return sent

            stage.say(rank)
            stage.serve({"send": send, "send_to": send_to})
    finally:
        dist.destroy_process_group()
