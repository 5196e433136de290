"""A backend whose engine does what a test tells it to, and a clock that a test sets forward."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.scripted import Worker
from weight_transfer.engine import LoadWeights, WeightTransferEngine
from weight_transfer.model.info import WeightTransferInitInfo, WeightTransferUpdateInfo
from weight_transfer.plugins.backend import API_VERSION, Backend
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch

    from weight_transfer.plan.exchange import IncomingRegions


class Script:
    """What the worker engines of the backend ``scripted`` do.

    Attributes:
        weights: what the trainer would send, in order.
        join: called by ``init_transfer_engine``.
        receive: called by ``receive_weights``; loads ``weights`` one by one unless a test replaces it.
        regions: called by ``receive_regions``.
        engines: all engines that were created.
    """

    def __init__(self) -> None:
        self.weights: list[tuple[str, torch.Tensor]] = []
        self.join: Callable[[WeightTransferInitInfo], None] = lambda info: None
        self.receive: Callable[[Any, WeightTransferUpdateInfo, LoadWeights], None] = self.load_all
        self.regions: Callable[[WeightTransferUpdateInfo, IncomingRegions], None] = lambda info, incoming: None
        self.engines: list[Any] = []

    def load_all(self, _engine: Any, _info: WeightTransferUpdateInfo, load_weights: LoadWeights) -> None:
        for name, tensor in self.weights:
            load_weights([(name, tensor)])


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """Close what is passed through it at the end of the test."""
    opened: list[Any] = []

    def _closing(thing: Any) -> Any:
        opened.append(thing)
        return thing

    yield _closing
    for thing in reversed(opened):
        thing.close()


@pytest.fixture
def script(install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Script:
    """Install the backend ``scripted``."""
    result = Script()

    class Worker(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.aborted = threading.Event()
            self.shutdowns = 0
            result.engines.append(self)

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
            result.join(init_info)

        def receive_weights(self, update_info: WeightTransferUpdateInfo, load_weights: LoadWeights) -> None:
            result.receive(self, update_info, load_weights)

        def receive_regions(self, update_info: WeightTransferUpdateInfo, incoming: IncomingRegions) -> None:
            result.regions(update_info, incoming)

        def abort_update(self) -> None:
            self.aborted.set()

        def shutdown(self) -> None:
            self.shutdowns += 1

    @hookimpl
    def weight_transfer_backend() -> Backend:
        engine = "scripted_backend:Worker"
        return Backend(
            name="scripted",
            api_version=API_VERSION,
            summary="",
            worker_engine=engine,
            trainer_engine="scripted_backend:None",
        )

    module: Any = types.ModuleType("scripted_backend")
    module.Worker, module.weight_transfer_backend = Worker, weight_transfer_backend
    monkeypatch.setitem(sys.modules, "scripted_backend", module)
    install("scripted", {"weight_transfer.backends": {"scripted": "scripted_backend"}})
    return result


@pytest.fixture
def worker(script: Script) -> Iterator[Worker]:
    """A worker with an engine of that backend."""
    result = Worker(script)
    yield result
    result.receiver.close()


class Clock:
    """Seconds of the library's deadlines."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of all deadlines."""
    result = Clock()
    monkeypatch.setattr("weight_transfer.values.deadline.time", result)
    return result
