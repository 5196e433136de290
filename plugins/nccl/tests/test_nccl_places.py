"""Tensors that move between updates are sent from, and received into, where they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import weight_transfer as wt

CONFIG = {"backend": "nccl", "timeout": 20, "bucket_bytes": "64KiB", "nccl": {"direct_bytes": "4KiB"}}


class Model(nn.Module):
    """Tensors that travel packed, whole from their own storage, and in several pieces."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.empty(7))
        self.square = nn.Parameter(torch.empty(64, 64))
        self.large = nn.Parameter(torch.empty(150, 150))
        self.randomise(seed)

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)


@pytest.fixture
def pair() -> Iterator[tuple[Model, Model, wt.WeightSender]]:
    trained, served = Model(1), Model(2)
    with wt.WeightReceiver(CONFIG, served) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained)
        yield trained, served, sender


def reallocated(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same address and shape, and other strides if it is a square matrix."""
    return tensor.t() if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("move", [reallocated, transposed])
@pytest.mark.parametrize("side", ["trainer", "worker", "both"])
def test_tensors_that_moved_are_found(
    pair: tuple[Model, Model, wt.WeightSender], move: Callable[[torch.Tensor], torch.Tensor], side: str
) -> None:
    trained, served, sender = pair
    for seed in (3, 4):
        for model in {"trainer": [trained], "worker": [served], "both": [trained, served]}[side]:
            for parameter in model.parameters():
                parameter.data = move(parameter.data)
        trained.randomise(seed)
        sender.send(trained)
        for sent, received in zip(trained.parameters(), served.parameters(), strict=True):
            assert torch.equal(sent, received)
        trained.randomise(0)  # what was received is a copy
        assert not torch.equal(trained.large, served.large)


def test_buckets_hold_no_more_than_what_is_packed(pair: tuple[Model, Model, wt.WeightSender]) -> None:
    trained, _, sender = pair
    assert sender.send(trained).extra_memory == 2 * 7 * 4
