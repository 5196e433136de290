"""With staging the old version is served until the new one is there, and a failed update leaves it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer import Region, Target
from weight_transfer.model.loading import KernelFormatLoader
from weight_transfer.session.update import Update

LOOPBACK = {"backend": "loopback", "timeout": 20, "bucket_bytes": 256}
IPC = {"backend": "ipc", "timeout": 20}
BACKENDS = pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(30, 8), nn.Linear(8, 4)

    def equals(self, other: nn.Module) -> bool:
        return all(map(torch.equal, self.state_dict().values(), other.state_dict().values()))


class Watched(wt.WeightSource):
    """Looks at something before each weight."""

    def __init__(self, model: nn.Module, look: Callable[[int], None]) -> None:
        self._inner = wt.ModuleSource(model)
        self._look = look

    def manifest(self) -> wt.Manifest:
        return self._inner.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(self._inner):
            self._look(index)
            yield item


@pytest.fixture
def open_all() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pair(
    stack: ExitStack, config: dict[str, Any], model: nn.Module, staging: str = "host", **arguments: Any
) -> tuple[wt.WeightReceiver, wt.WeightSender]:
    receiver = stack.enter_context(wt.WeightReceiver(config | {"staging": staging}, model, **arguments))
    return receiver, stack.enter_context(wt.WeightSender(config, [receiver]))


@BACKENDS
@pytest.mark.parametrize("staging", ["host", "device"])
def test_the_old_version_is_served_while_the_new_one_arrives(
    open_all: ExitStack, config: dict[str, Any], staging: str
) -> None:
    model = Net(9)
    receiver, sender = pair(open_all, config, model, staging)
    sender.send(Net(1))
    looks: list[int] = []

    def look(_index: int) -> None:
        with receiver.serving(timeout=0) as version:
            assert model.equals(before)
            looks.append(int(version))

    for version, seed in enumerate((2, 1, 2), start=1):
        before = Net(0)
        before.load_state_dict(model.state_dict())
        sender.send(Watched(Net(seed), look))
        assert receiver.version == version
        assert model.equals(Net(seed))
        assert looks[-4:] == [version - 1] * 4


@BACKENDS
def test_an_update_that_fails_leaves_the_old_version(open_all: ExitStack, config: dict[str, Any]) -> None:
    model = Net(9)
    receiver, sender = pair(open_all, config, model)
    sender.send(Net(1))

    def fail(index: int) -> None:
        if index == 3:
            raise OSError("the disk is gone")

    with pytest.raises(wt.TransferError, match="the disk is gone"):
        sender.send(Watched(Net(2), fail))
    assert receiver.version == 0
    assert model.equals(Net(1))
    assert sender.send(Net(2)).version == 1
    assert model.equals(Net(2))


def test_bytes_that_arrive_wrong_leave_the_old_version(open_all: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(9)
    receiver, sender = pair(open_all, LOOPBACK | {"verify": "wire"}, model)
    sender.send(Net(1))
    honest = Update.__call__

    def load(update: Update, weights: list[tuple[str, torch.Tensor]]) -> None:
        honest(update, [(name, tensor + (name == "b.weight")) for name, tensor in weights])

    with monkeypatch.context() as wire:
        wire.setattr(Update, "__call__", load)
        with pytest.raises(wt.IntegrityError, match=r"'b.weight' arrived with other bytes"):
            sender.send(Net(2))
    assert receiver.version == 0
    assert model.equals(Net(1))
    sender.send(Net(2))
    assert model.equals(Net(2))


def test_what_fails_while_it_is_loaded_is_served_by_nobody(open_all: ExitStack) -> None:
    fails: list[str] = []

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        if fails and "b.weight" in dict(weights):
            raise OSError(fails.pop())

    receiver, sender = pair(open_all, LOOPBACK, Net(), load_weights=load)
    sender.send(Net(1))
    fails.append("no kernel for this layout")
    with pytest.raises(wt.TransferError, match="no kernel for this layout"):
        sender.send(Net(2))
    assert receiver.version is None
    assert sender.send(Net(2)).version == receiver.version == 1


def test_what_is_loaded_is_read_back(open_all: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    receiver, sender = pair(open_all, LOOPBACK | {"verify": "loaded"}, model)
    sender.send(Net(1))
    honest = KernelFormatLoader.finish

    def finish(loader: KernelFormatLoader) -> None:
        honest(loader)
        nn.init.zeros_(model.a.bias)

    monkeypatch.setattr(KernelFormatLoader, "finish", finish)
    with pytest.raises(wt.IntegrityError, match=r"'a.bias' lies in the worker's model with other bytes"):
        sender.send(Net(2))
    assert receiver.version is None


def test_a_commit_waits_for_those_who_sample(open_all: ExitStack) -> None:
    model = Net(9)
    receiver, sender = pair(open_all, LOOPBACK, model)
    sender.send(Net(1))
    arrived = threading.Event()
    with receiver.serving():
        sending = threading.Thread(
            target=lambda: sender.send(Watched(Net(2), lambda index: arrived.set() if index == 3 else None))
        )
        sending.start()
        assert arrived.wait(10)
        assert model.equals(Net(1))
    sending.join(10)
    assert receiver.version == 1
    assert model.equals(Net(2))


def test_somebody_who_samples_for_ever_keeps_the_old_version(open_all: ExitStack) -> None:
    model = Net(9)
    receiver, sender = pair(open_all, LOOPBACK | {"timeout": 1.0}, model)
    sender.send(Net(1))
    with receiver.serving() as version:
        with pytest.raises(wt.TransferTimeoutError, match="still in serving"):
            sender.send(Net(2))
        assert version == 0
        assert model.equals(Net(1))
    assert receiver.version == 0


def test_what_would_go_by_region_comes_whole(open_all: ExitStack) -> None:
    half = nn.Module()
    half.register_parameter("rows", nn.Parameter(torch.zeros(4, 30)))
    target = Target(Region.split((8, 30), 0, 1, 2), half.rows)
    _, sender = pair(open_all, IPC, half, needs={"weight": target})
    trained = nn.Linear(30, 8, bias=False)
    report = sender.send(trained)
    assert torch.equal(half.rows, trained.weight[4:])
    assert not report.kept


def test_a_cast_to_the_receivers_dtype_is_known(open_all: ExitStack) -> None:
    model = Net(9).bfloat16()
    _, sender = pair(open_all, LOOPBACK | {"cast": {"*": "receiver"}}, model)
    sender.send(Net(1))
    assert model.equals(Net(1).bfloat16())
