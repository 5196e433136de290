"""A receiver of the backend ``scripted``, with its model, and the states that a test can bring it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer import Manifest, ParamMeta, ReceiverState, TransferError, WeightReceiver

INIT = {"rank_offset": 1, "world_size": 2, "timeout": 10}
NAMES = ("first", "second", "third")


class Served(nn.Module):
    """The model that serves: three parameters of one value."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.full((4, 3), value)))

    @property
    def values(self) -> list[float]:
        """The value of each parameter; fails if one of them is mixed within itself."""
        assert all((parameter == parameter.flatten()[0]).all() for parameter in self.parameters())
        return [parameter.flatten()[0].item() for parameter in self.parameters()]


class Worker:
    """A receiver with its model, and a trainer that this test plays itself."""

    def __init__(self, script: Any, timeout: float = 10, **arguments: Any) -> None:
        self.script = script
        self.model = Served()
        self.receiver = WeightReceiver({"backend": "scripted", "timeout": timeout}, self.model, **arguments)

    def init(self) -> None:
        self.receiver.init_weight_transfer_engine(INIT)

    def start(self) -> None:
        self.receiver.start_weight_update()

    def info(self, value: float, version: int | str | None = None, **fields: Any) -> dict[str, Any]:
        """Have three parameters of ``value`` sent next, and return what the receiver is told."""
        self.script.weights = [(name, torch.full((4, 3), value)) for name in NAMES]
        manifest = Manifest(ParamMeta(name, "float32", (4, 3)) for name in NAMES)
        return {"manifest": manifest.to_wire(), "timeout": 10, "version": version, **fields}

    def update(self, value: float, version: int | str | None = None, **fields: Any) -> None:
        """Send three parameters of ``value``."""
        self.receiver.update_weights(self.info(value, version, **fields))

    def finish(self, version: int | str | None = None) -> None:
        self.receiver.finish_weight_update(version)

    def deliver(self, value: float, version: int | str) -> None:
        self.start()
        self.update(value, version)
        self.finish(version)

    def resync(self, value: float, version: int | str) -> None:
        """Do what a trainer does about a worker that failed."""
        self.init()
        self.deliver(value, version)

    @property
    def engine(self) -> Any:
        return self.script.engines[-1]


def breaks(worker: Worker, parameters: int, error: BaseException | None = None) -> None:
    """Let the next update fail after that many parameters."""
    good = worker.script.receive

    def receive(_engine: Any, _info: Any, load_weights: Any) -> None:
        worker.script.receive = good
        for name, tensor in worker.script.weights[:parameters]:
            load_weights([(name, tensor)])
        raise error or OSError("the cable was pulled")

    worker.script.receive = receive


def to_created(worker: Worker) -> None:
    assert worker.receiver.state is ReceiverState.CREATED


def to_ready(worker: Worker) -> None:
    worker.init()
    worker.deliver(1.0, "old")


def to_updating(worker: Worker) -> None:
    to_ready(worker)
    worker.start()


def to_received(worker: Worker) -> None:
    to_updating(worker)
    worker.update(2.0, "new")


def to_failed(worker: Worker) -> None:
    to_updating(worker)
    breaks(worker, 1)
    with pytest.raises(TransferError):
        worker.update(2.0, "new")


def to_closed(worker: Worker) -> None:
    to_ready(worker)
    worker.receiver.close()


State = Callable[[Worker], None]
STATES: dict[str, State] = {
    "created": to_created,
    "ready": to_ready,
    "updating": to_updating,
    "received": to_received,
    "failed": to_failed,
    "closed": to_closed,
}
