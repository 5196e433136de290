"""A LoRA model's merged weights reach a worker of the base model, from one trainer rank or from several."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from support.actors import Actor
from weight_transfer.control import serve

pytest.importorskip("peft")

CONFIG: dict[str, Any] = {"backend": "ipc", "timeout": 60, "bucket_bytes": "4KiB"}


@pytest.mark.parametrize("cast", [{}, {"*": "bfloat16"}], ids=["exact", "cast"])
def test_sharded_lora_weights_are_gathered_and_merged(tmp_path: Path, cast: dict[str, str]) -> None:
    model = nn.Sequential(nn.Embedding(33, 64), nn.Linear(64, 17), nn.Linear(17, 12))
    if cast:
        model.bfloat16()
    with ExitStack() as stack:
        receiver = stack.enter_context(wt.WeightReceiver(CONFIG, model))
        server = stack.enter_context(serve(receiver))
        spec = {"world_size": 2, "store": str(tmp_path / "store"), "workers": [server.url]}
        ranks = [Actor("fsdp_lora_trainer", rank=rank, config=CONFIG | {"cast": cast}, **spec) for rank in range(2)]
        for rank in ranks:
            stack.callback(rank.stop)
        for rank in ranks:
            rank.ready()
        for version in (1, 2):
            for rank in ranks:
                rank.tell("send", version=version)
            merged = [rank.reply() for rank in ranks]
            assert merged[0] == merged[1]
            assert receiver.version == version
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor.flatten(), torch.tensor(merged[0][name]).to(tensor.dtype)), name
