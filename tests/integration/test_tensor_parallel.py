"""Workers whose parameters are sharded with ``DTensor``: each takes its part of the weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from support.actors import Actor
from support.parallel_worker import PLACEMENTS, model

CONFIG: dict[str, Any] = {"backend": "ipc", "timeout": 30, "bucket_bytes": "1KiB"}


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Actor]]:
    with ExitStack() as stack:
        pending = [
            Actor("parallel_worker", rank=rank, store=str(tmp_path / "store"), config=CONFIG | request.param)
            for rank in range(2)
        ]
        for rank in pending:
            stack.callback(rank.stop)
        yield [rank.ready() for rank in pending]


@pytest.mark.parametrize(
    "ranks",
    [{}, {"is_checkpoint_format": False}, {"verify": "wire"}, {"ipc": {"export": "stage"}}, {"backend": "nccl"}],
    indirect=True,
    ids=["ipc", "kernel format", "verified", "staged", "nccl"],
)
def test_each_rank_keeps_its_part_of_whole_weights(ranks: list[Actor], request: pytest.FixtureRequest) -> None:
    config = CONFIG | request.node.callspec.params["ranks"]
    trained = model()
    with wt.WeightSender(config, [rank.hello for rank in ranks]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            torch.manual_seed(seed)
            for parameter in trained.parameters():
                nn.init.normal_(parameter)
            sender.send(trained, version=version)
            assert_kept(ranks, trained)
        for rank in ranks:
            rank.ask("move")
        sender.send(trained, version="moved")
        assert_kept(ranks, trained)


def assert_kept(ranks: list[Actor], trained: nn.Module) -> None:
    for rank in ranks:
        rank.tell("whole")
    for rank in ranks:
        whole = rank.reply()
        for name, parameter in trained.named_parameters():
            assert torch.equal(torch.tensor(whole[name]).view(parameter.shape), parameter), name
    for index, rank in enumerate(ranks):
        kept = rank.ask("kept")
        for name, placement in PLACEMENTS.items():
            full = trained.get_parameter(name)
            dim = getattr(placement, "dim", None)
            own = full if dim is None else full[wt.Region.split(full.shape, dim, index, 2).slices]
            assert torch.equal(torch.tensor(kept[name]).view(own.shape), own), name
