"""One rank of a tensor-parallel inference server: its parameters are ``DTensor`` shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import weight_transfer as wt
from weight_transfer.control import serve

if TYPE_CHECKING:
    from support.actors import Stage

PLACEMENTS: dict[str, Placement] = {
    "0.weight": Shard(0),
    "0.bias": Shard(0),
    "1.weight": Shard(1),
    "1.bias": Replicate(),
    "2.weight": Shard(0),
    "2.bias": Shard(-1),
}


def model() -> nn.Sequential:
    """The whole model; its last layer has more ranks than rows, so that one of them keeps nothing of it."""
    return nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 17), nn.Linear(17, 1), nn.LayerNorm(1))


def main(stage: Stage, rank: int, store: str, config: dict[str, Any]) -> None:
    """Serve half of a model over HTTP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        served = model()
        for name, placement in PLACEMENTS.items():
            parent, _, leaf = name.partition(".")
            sharded = distribute_tensor(torch.zeros_like(served.get_parameter(name)), mesh, [placement])
            setattr(served[int(parent)], leaf, nn.Parameter(sharded))

        def kept() -> dict[str, list[Any]]:
            return {
                name: getattr(parameter, "_local_tensor", parameter).detach().tolist()
                for name, parameter in served.named_parameters()
            }

        def whole() -> dict[str, list[Any]]:
            gathered: dict[str, Any] = dict(served.named_parameters())
            gathered |= {name: gathered[name].full_tensor() for name in PLACEMENTS}
            return {name: tensor.detach().tolist() for name, tensor in gathered.items()}

        def move() -> None:
            weight: Any = served[0].weight
            weight._local_tensor = torch.zeros_like(weight._local_tensor)

        with wt.WeightReceiver(config, served) as receiver, serve(receiver) as server:
            stage.say(server.url)
            stage.serve({"kept": kept, "whole": whole, "move": move})
    finally:
        dist.destroy_process_group()
