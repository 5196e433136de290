"""One rank of a trainer whose LoRA model is sharded with FSDP2."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import weight_transfer as wt

if TYPE_CHECKING:
    from support.actors import Stage


def main(stage: Stage, rank: int, world_size: int, store: str, config: dict[str, Any], workers: list[str]) -> None:
    warnings.simplefilter("ignore")
    import peft

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        torch.manual_seed(5)
        base = nn.Sequential(nn.Embedding(33, 64), nn.Linear(64, 17), nn.Linear(17, 12))
        adapters = peft.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False, modules_to_save=["2"])
        model: Any = peft.get_peft_model(base, adapters)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        whole = copy.deepcopy(model)
        for module in list(model.modules()):
            if isinstance(getattr(module, "base_layer", None), nn.Linear):
                fully_shard(module)
        fully_shard(model)
        sharded = list(model.parameters())
        parallel = wt.ParallelConfig(rank=rank, world_size=world_size)
        with wt.WeightSender(config, workers, parallel_config=parallel) as sender:

            def send(version: int) -> dict[str, list[float]]:
                model(torch.arange(4))  # FSDP2 leaves parameters unsharded, and stale after a step
                with torch.no_grad():
                    for parameter, own in zip(whole.parameters(), sharded, strict=True):
                        parameter.mul_(1.5)
                        own.mul_(1.5)
                sender.send(wt.MergedLoraSource(model), version=version)
                merged = copy.deepcopy(whole).merge_and_unload()
                return {name: tensor.flatten().tolist() for name, tensor in merged.state_dict().items()}

            stage.say(rank)
            stage.serve({"send": send})
    finally:
        dist.destroy_process_group()
