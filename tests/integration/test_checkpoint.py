"""A checkpoint on disk goes to workers like a model, through the buckets of the ipc, nccl and rdma backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weight_transfer as wt


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 30), nn.LayerNorm(30))


def _save(directory: Path, model: nn.Module) -> Path:
    """Write a checkpoint of two shards, without an index."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = sorted(weights)
    directory.mkdir()
    for shard, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, directory / f"model-{shard}.safetensors")
    return directory


@pytest.mark.parametrize("backend", ["ipc", "nccl", "rdma", "loopback"])
def test_checkpoints_arrive_bit_for_bit_from_a_to_b_and_back(tmp_path: Path, backend: str) -> None:
    config: dict[str, Any] = {"backend": backend, "bucket_bytes": "4KiB", "timeout": 30}
    paths = [_save(tmp_path / str(seed), _model(seed)) for seed in (1, 2)]
    served = _model(3)
    with wt.WeightReceiver(config, served) as receiver, wt.WeightSender(config, [receiver]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            report = sender.send(wt.CheckpointSource(paths[seed - 1]), version=version)
            assert report.params == 6
            for ours, theirs in zip(served.state_dict().values(), _model(seed).state_dict().values(), strict=True):
                assert torch.equal(ours, theirs)


def test_a_truncated_checkpoint_changes_nothing(tmp_path: Path) -> None:
    path = _save(tmp_path / "1", _model(1))
    shard = path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    served = _model(3)
    with (
        wt.WeightReceiver({"backend": "ipc"}, served) as receiver,
        wt.WeightSender({"backend": "ipc"}, [receiver]) as sender,
    ):
        sender.send(_model(2), version=1)
        with pytest.raises(wt.IntegrityError, match=r"model-1\.safetensors is truncated or damaged"):
            sender.send(wt.CheckpointSource(path), version=2)
        assert receiver.version == 1
