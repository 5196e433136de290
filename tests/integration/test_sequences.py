"""Long random sequences of everything that a trainer may do, with failures between; every bit is compared each time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weight_transfer import (
    CheckpointSource,
    ModuleSource,
    ReplacedError,
    WeightReceiver,
    WeightSender,
    WeightTransferError,
)
from weight_transfer.testing.models import hashes
from weight_transfer_rdma.nixl import installed

if TYPE_CHECKING:
    from weight_transfer.model.source import WeightSource

TARGETS = ("model", "draft")


class Net(nn.Module):
    """Small and large weights, none of them, a buffer of integers; on the worker in any dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(40, 30, dtype=dtype))
        self.layers = nn.ModuleList(nn.Linear(30, 30, dtype=dtype) for _ in range(2))
        self.scale = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, 5, dtype=dtype))
        self.zero = nn.Parameter(torch.zeros((), dtype=dtype))
        self.norm = nn.LayerNorm(30, dtype=dtype)
        self.register_buffer("count", torch.zeros(7, dtype=torch.int64))


class FailingSource(ModuleSource):
    """Raises before its second weight."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield next(super().__iter__())
        raise RuntimeError("told to fail")


class Loader:
    """Copies by name, and fails at its next call if it is told to."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.fails = False

    def __call__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        targets = self._model.state_dict()
        for name, tensor in weights:
            targets[name].copy_(tensor)
        if self.fails:
            self.fails = False
            raise ValueError("told to fail")


class Worker:
    """A receiver, and what its models must hold: weights, and whose they are."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, own_loader: bool) -> None:
        self.models = {target: Net(dtype) for target in TARGETS}
        self.loader = Loader(self.models["model"]) if own_loader else None
        draft = {"draft": self.models["draft"]}
        self.receiver = WeightReceiver(config, self.models["model"], load_weights=self.loader, targets=draft)
        self.meant = {target: hashes(model) for target, model in self.models.items()}
        self.whose: dict[str, object] = dict.fromkeys(TARGETS)

    def check(self, target: str) -> None:
        """Compare what is whole."""
        if self.receiver.versions[target] is not None:
            assert hashes(self.models[target]) == self.meant[target]


class Sequence:
    """One sequence.

    Args:
        backend: its name.
        seed: decides everything.
        folder: for checkpoints.
    """

    def __init__(self, backend: str, seed: int, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.dtype = torch.bfloat16 if seed % 2 else torch.float32
        self.config: dict[str, Any] = {
            "backend": backend,
            "timeout": 30,
            "bucket_bytes": self.chance.choice([1024, 2**20]),
            "verify": "wire" if seed % 3 == 2 else "none",
            "cast": {"*": "bfloat16"} if seed % 2 else {},
        }
        self.workers = [Worker(self.config, self.dtype, own_loader) for own_loader in (False, True)]
        self.sender = self._new_sender()
        self.replaced: list[WeightSender] = []
        self.sent: dict[tuple[WeightSender, str], object] = {}
        self.nets = [Net(), Net()]
        self.file = folder / "model.safetensors"
        self.checkpoint: CheckpointSource | None = None
        self.published = 0

    def run(self, steps: int) -> None:
        """Do one thing after another."""
        changes: list[Callable[[], None]] = [self.replace, self.turn, self.move, self.assign, self.rejoin, self.reopen]
        for _ in range(steps):
            if self.chance.random() < 0.4:
                self.chance.choice(changes)()
            else:
                self.update()

    def close(self) -> None:
        """Close everything."""
        for sender in (self.sender, *self.replaced):
            sender.close()
        for worker in self.workers:
            worker.receiver.close()

    # What may happen between two updates.

    def replace(self) -> None:
        self._net().scale = nn.Parameter(torch.randn(3))

    def turn(self) -> None:
        layer = self.chance.choice(list(self._net().layers))
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.data = layer.weight.data.t()

    def move(self) -> None:
        for parameter in self.chance.choice(self.workers).models["model"].parameters():
            parameter.data = parameter.data.clone()

    def assign(self) -> None:
        net = self._net()
        net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)

    def rejoin(self) -> None:
        worker = self.chance.choice(self.workers)
        self.sender.remove_worker(worker.receiver)
        self.sender.add_worker(worker.receiver)

    def reopen(self) -> None:
        if self.chance.random() < 0.5:
            self.sender.close()
        elif self.sender._fleet.tenure.lease is not None:
            self.replaced.append(self.sender)
        self.sender = self._new_sender()

    # One update.

    def update(self) -> None:
        sender, net, target = self.sender, self._net(), self.chance.choice(TARGETS)
        for tensor in net.state_dict().values():
            tensor.copy_(torch.randint(-99, 99, tensor.shape) / (1 if tensor.dtype is torch.int64 else 7))
        names = list(net.state_dict())
        kind = self.chance.choice(["module", "module", "checkpoint", "part", "part", "source", "loader"])
        only = self.chance.sample(names, self.chance.randrange(1, len(names))) if kind == "part" else None
        whose = self.sent.get((sender, target))
        meant = hashes(_cast(net, self.dtype))
        if kind == "loader":
            assert self.workers[1].loader is not None
            self.workers[1].loader.fails = target == "model"
        fails = kind == "source" or (kind == "loader" and target == "model")
        known = whose is not None and all(worker.whose[target] is whose for worker in self.workers)
        fails |= only is not None and not known
        version = self.chance.choice([1, 2, "latest"])
        try:
            sender.send(self._source(kind, net), version, target=target, only=only, allow_rollback=True)
        except WeightTransferError:
            assert fails
        else:
            assert not fails
            self.published += 1
            self._refuse_the_replaced(net)
            self.sent[sender, target] = update = object()
            for worker in self.workers:
                worker.whose[target] = update
                worker.meant[target] |= {name: meant[name] for name in only or names}
                assert worker.receiver.versions[target] == version
        for tensor in net.state_dict().values():
            tensor.zero_()  # the weights may change as soon as send has returned
        for worker in self.workers:
            for each in TARGETS:
                worker.check(each)
            if worker.receiver.versions[target] is None:
                worker.whose[target] = None

    def _refuse_the_replaced(self, net: Net) -> None:
        for sender in self.replaced:
            with sender, pytest.raises(ReplacedError):
                sender.send(net, version=1, allow_rollback=True)
        self.replaced.clear()

    def _new_sender(self) -> WeightSender:
        return WeightSender(self.config, [worker.receiver for worker in self.workers])

    def _net(self) -> Net:
        return self.chance.choice(self.nets)

    def _source(self, kind: str, net: Net) -> nn.Module | WeightSource:
        if kind == "source":
            return FailingSource(net)
        if kind == "checkpoint":
            save_file({name: tensor.clone().contiguous() for name, tensor in net.state_dict().items()}, self.file)
            self.checkpoint = self.checkpoint or CheckpointSource(self.file)
            return self.checkpoint
        return net


def _cast(net: Net, dtype: torch.dtype) -> Net:
    result = Net(dtype)
    result.load_state_dict(net.state_dict())
    return result


@pytest.mark.parametrize(
    ("backend", "seed", "steps"),
    [
        *((backend, seed, 60) for backend in ("loopback", "ipc", "nccl") for seed in range(4)),
        ("rdma", 0, 20),  # whose agents take a while to start anew after each failure
    ],
)
def test_whatever_happens_before_what_is_served_is_what_was_sent(
    backend: str, seed: int, steps: int, tmp_path: Path
) -> None:
    if backend == "rdma" and not installed():
        pytest.skip("NIXL is not installed")
    sequence = Sequence(backend, seed, tmp_path)
    try:
        sequence.run(steps)
    finally:
        sequence.close()
    assert sequence.published > steps / 6
