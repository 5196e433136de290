"""Launches are long where every member has its weights in place, and as long as buckets where one has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.receiving import Receiving
from weight_transfer_nccl.sending import Sending

CONFIG = {"backend": "nccl", "timeout": 30, "bucket_bytes": "4KiB", "nccl": {"direct_bytes": "1KiB"}}
SHORT, LONG = 9, 2  # launches of eight weights of 4 KiB and a small one


def model(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Module()
    for number in range(8):
        setattr(made, f"w{number}", nn.Parameter(torch.randn(32, 32, generator=generator)))
    made.small = nn.Parameter(torch.randn(7, generator=generator))
    return made


def is_alike(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def fill(trained: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for own, other in zip(trained.parameters(), model(seed).parameters(), strict=True):
            own.copy_(other)


def loader_of(served: nn.Module) -> Callable[[list[tuple[str, torch.Tensor]]], None]:
    @torch.no_grad()
    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            served.get_parameter(name).copy_(tensor)

    return load


def turn(module: nn.Module) -> None:
    """Let a large weight be one that is not contiguous."""
    module.w3 = nn.Parameter(module.w3.detach().clone().t())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors the trainer has broadcast in each launch."""
    found: list[int] = []
    broadcast = Group.broadcast

    def counted(group: Group, data: Sequence[torch.Tensor], *rest: Any) -> Any:
        if not group._rank:
            found.append(len(data))
        return broadcast(group, data, *rest)

    monkeypatch.setattr(Group, "broadcast", counted)
    return found


def sent(
    sender: wt.WeightSender, trained: nn.Module, served: Sequence[nn.Module], seed: int, launches: list[int]
) -> int:
    """Send a version, see that every bit has arrived, and return the number of launches."""
    fill(trained, seed)
    launches.clear()
    sender.send(trained)
    assert all(is_alike(trained, own) for own in served)
    return len(launches)


@pytest.mark.parametrize(
    ("case", "count"), [("in place", LONG), ("loader", SHORT), ("worker", SHORT), ("trainer", SHORT), ("verify", SHORT)]
)
def test_launches_are_long_where_every_member_has_its_weights_in_place(
    launches: list[int], case: str, count: int
) -> None:
    trained, served = model(1), [model(seed) for seed in (2, 3)]
    if case in ("worker", "trainer"):
        turn(trained if case == "trainer" else served[1])
    loaders = [None, loader_of(served[1]) if case == "loader" else None]
    config = CONFIG | {"verify": "wire" if case == "verify" else "none"}
    receivers = [wt.WeightReceiver(config, own, load_weights=load) for own, load in zip(served, loaders, strict=True)]
    with receivers[0], receivers[1], wt.WeightSender(config, receivers) as sender:
        sender.send(trained)
        for seed in (4, 5, 4):
            assert sent(sender, trained, served, seed, launches) == count


def test_a_worker_that_changes_its_mind_changes_that_of_all(launches: list[int]) -> None:
    trained, served = model(1), [model(seed) for seed in (2, 3)]
    config = CONFIG | {"verify": "none"}
    receivers = [wt.WeightReceiver(config, own) for own in served]
    with receivers[0], receivers[1], wt.WeightSender(config, receivers) as sender:
        sender.send(trained)
        assert sent(sender, trained, served, 4, launches) == LONG
        turn(served[0])
        assert sent(sender, trained, served, 5, launches) == SHORT
        served[0].w3 = nn.Parameter(served[0].w3.detach().contiguous())
        assert sent(sender, trained, served, 4, launches) == LONG


@pytest.mark.parametrize("pipeline", [Sending, Receiving], ids=["trainer", "worker"])
def test_each_side_by_itself_keeps_launches_short_if_bytes_are_compared(
    launches: list[int], pipeline: type[Sending | Receiving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side is made to agree."""
    other, method = (Receiving, "receive") if pipeline is Sending else (Sending, "send")
    own = getattr(other, method)
    monkeypatch.setattr(other, method, lambda *given, may_be_long: own(*given, may_be_long=True))
    trained, served = model(1), [model(2)]
    with wt.WeightReceiver(CONFIG, served[0]) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained)
        for seed in (4, 5, 4):
            assert sent(sender, trained, served, seed, launches) == SHORT


@pytest.mark.parametrize("verify", ["none", "wire"])
@pytest.mark.parametrize("loads", [False, True], ids=["in place", "loader"])
def test_weights_without_elements_take_no_place_from_others(loads: bool, verify: str) -> None:
    """Packed by themselves beside a large one, they once had a byte sent, into the place of the large one's first."""

    def fresh() -> nn.Module:
        made = nn.Module()
        for number in range(20):
            setattr(made, f"a{number}", nn.Parameter(torch.zeros(0)))
            setattr(made, f"b{number}", nn.Parameter(torch.zeros(32, 32)))
        return made

    trained, served = fresh(), [fresh() for _ in range(3)]
    config = CONFIG | {"verify": verify}
    loaders = [loader_of(own) if loads else None for own in served]
    receivers = [wt.WeightReceiver(config, own, load_weights=load) for own, load in zip(served, loaders, strict=True)]
    with receivers[0], receivers[1], receivers[2], wt.WeightSender(config, receivers) as sender:
        for value in (1.0, 2.0, 1.0) * 5:
            with torch.no_grad():
                for weight in trained.parameters():
                    weight.fill_(value)
            sender.send(trained)
            assert all(is_alike(trained, own) for own in served)
            assert bool((served[0].b7 == value).all())
