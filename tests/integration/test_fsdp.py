"""A trainer of two ranks, sharded with FSDP2: parameters are gathered in lockstep, and rank 0 sends."""

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
from weight_transfer.control import serve

CONFIG: dict[str, Any] = {"backend": "ipc", "timeout": 30, "bucket_bytes": "4KiB"}


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 17))


@pytest.fixture
def ranks_and_receiver(
    model: nn.Sequential, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[list[Actor], wt.WeightReceiver]]:
    config = CONFIG | getattr(request, "param", {})
    trainer = {key: config.pop(key) for key in ("told", "sharded") if key in config}
    if "cast" in config:
        model.bfloat16()
    with ExitStack() as stack:
        receiver = stack.enter_context(wt.WeightReceiver(config, model))
        server = stack.enter_context(serve(receiver))
        pending = [
            Actor(
                "fsdp_trainer",
                rank=rank,
                world_size=2,
                store=str(tmp_path / "store"),
                config=config,
                workers=[server.url],
                **trainer,
            )
            for rank in range(2)
        ]
        for rank in pending:
            stack.callback(rank.stop)
        yield [rank.ready() for rank in pending], receiver


@pytest.mark.parametrize(
    "ranks_and_receiver",
    [
        {},
        {"verify": "wire"},
        {"backend": "nccl"},
        {"backend": "nccl", "nccl": {"direct_bytes": "1KiB"}},
        {"cast": {"*": "bfloat16"}},
        {"cast": {"*": "receiver", "1.*": "bfloat16"}, "verify": "wire"},
        {"told": False},
        {"told": False, "backend": "nccl", "verify": "wire"},
    ],
    indirect=True,
    ids=[
        "ipc",
        "ipc, verified",
        "nccl, packed",
        "nccl, direct",
        "ipc, cast",
        "ipc, cast to the receiver's dtype",
        "ipc, ranks found",
        "nccl, ranks found",
    ],
)
def test_gathered_parameters_arrive_bit_for_bit(
    ranks_and_receiver: tuple[list[Actor], wt.WeightReceiver], model: nn.Sequential
) -> None:
    ranks, receiver = ranks_and_receiver
    for version, seed in enumerate((1, 2, 1)):
        for rank in ranks:
            rank.tell("send", seed=seed, version=version)
        sent = [rank.reply() for rank in ranks]
        assert sent[0] == sent[1]
        assert receiver.version == version
        for parameter, values in zip(model.parameters(), sent[0], strict=True):
            assert torch.equal(parameter.detach().flatten(), torch.tensor(values).to(parameter.dtype))


def test_a_failed_update_leaves_no_rank_in_a_collective(
    ranks_and_receiver: tuple[list[Actor], wt.WeightReceiver], model: nn.Sequential
) -> None:
    ranks, receiver = ranks_and_receiver
    wrong = model[1]
    model[1] = nn.Linear(64, 5)
    for rank in ranks:
        rank.tell("send", seed=1, version=1)
    errors = [rank.error() for rank in ranks]
    assert {type(error) for error in errors} == {wt.ManifestMismatchError}
    assert str(errors[0]) == str(errors[1])
    model[1] = wrong
    for rank in ranks:
        rank.tell("send", seed=2, version=2)
    sent = [rank.reply() for rank in ranks]
    assert receiver.version == 2
    assert torch.equal(next(model.parameters()).detach().flatten(), torch.tensor(sent[0][0]))


@pytest.mark.parametrize("ranks_and_receiver", [{"told": False}], indirect=True)
def test_ranks_that_were_found_agree_on_a_first_version(
    ranks_and_receiver: tuple[list[Actor], wt.WeightReceiver],
) -> None:
    ranks, receiver = ranks_and_receiver
    for rank in ranks:
        rank.tell("send", seed=1)
    for rank in ranks:
        rank.reply()
    assert receiver.version == 0


@pytest.mark.parametrize("ranks_and_receiver", [{"told": False, "sharded": False}], indirect=True)
def test_a_rank_that_has_all_weights_sends_them_to_its_own_worker(
    ranks_and_receiver: tuple[list[Actor], wt.WeightReceiver], model: nn.Sequential
) -> None:
    ranks, receiver = ranks_and_receiver
    own = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 17))
    with wt.WeightReceiver(CONFIG, own) as second, serve(second) as server:
        ranks[0].tell("send", seed=1)
        ranks[1].tell("send_to", seed=2, worker=server.url)
        sent = [rank.reply() for rank in ranks]
        assert receiver.version == second.version == 0
    for got, values in zip((model, own), sent, strict=True):
        for parameter, expected in zip(got.parameters(), values, strict=True):
            assert torch.equal(parameter.detach().flatten(), torch.tensor(expected))
