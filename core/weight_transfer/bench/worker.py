"""The workers, which keep all weights or a part of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weight_transfer.bench.member import Member, Scene, Tree
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.control.http_server import serve
from weight_transfer.limit import settle
from weight_transfer.model.shards import Target
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.hookspecs import hookimpl
from weight_transfer.plugins.manager import load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.session.receiver import WeightReceiver

if TYPE_CHECKING:
    from weight_transfer.limit import Seconds
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.regions import Region
    from weight_transfer.testing.actors import Stage
    from weight_transfer.values.events import TransferFinished, TransferStarted

Span = tuple[str, float, float]
"""What was done, when that began by `time.perf_counter`, which all processes of a host share, and seconds."""

_METHODS = {"receive_weights": "receive", "receive_regions": "receive regions"}


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    """Be worker ``number``."""
    Worker(Scene.of(scene), number).perform(stage)


class Worker(Member):
    """A worker behind HTTP, whose model holds its part of each weight, declared with ``needs`` if they are cut."""

    def __init__(self, scene: Scene, number: int) -> None:
        parts = scene.parts
        super().__init__(scene, len(scene.trainers) + number, scene.workers[number], parts.by_rank(number))
        self.number = number
        self.model = Tree()
        self.regions = {name: self.parts.kept(name, number) for name in self.parts.shapes}
        self._loaded = load_backend(scene.backend)
        self._serving = ExitStack()
        self.stack.callback(self._serving.close)
        self._calls: list[tuple[str, float, Seconds]] = []
        self._ended: tuple[float, float] = (0.0, 0.0)
        self._phases: dict[str, float] = {}

    def enter(self) -> None:
        super().enter()
        for name, region in self.regions.items():
            if region is not None:
                part = torch.zeros(region.shape, dtype=self.dtype(name), device=self.device)
                self.model.plant(name, nn.Parameter(part, requires_grad=False))
        self._watch_engine()

    def serve(self) -> dict[str, str]:
        """Serve new receivers in place of the last ones, one for each way; return their addresses."""
        self._serving.close()
        by_region = not self.parts.all_alike and Capability.REGIONS in self._loaded.backend.capabilities
        needs = self._needs if by_region else None
        urls = {}
        for way, changes in self.scene.ways.items():
            receiver = WeightReceiver({**self.scene.config, **changes}, self.model, needs=needs, observers=(self,))
            urls[way] = self._serving.enter_context(serve(self._serving.enter_context(receiver))).url
        return urls

    @hookimpl
    def weight_transfer_started(self, event: TransferStarted) -> None:
        """Forget what the engine did in the last update."""
        self._calls = []

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        """Take note of when the update ended, how long it took, and where its time went."""
        self._ended = time.perf_counter(), event.seconds
        self._phases = dict(event.phases)

    def engine_seconds(self) -> dict[str, Seconds]:
        """Return wall time and the thread's CPU time of the engine's methods in the last update."""
        return {method: seconds for method, _, seconds in self._calls}

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase of the last update, as observers hear of them."""
        return self._phases

    def spans(self) -> list[Span]:
        """Return what was done in the last update, in order."""
        ended, seconds = self._ended
        began = ended - seconds
        spans: list[Span] = []
        for method, since, (wall, _) in self._calls:
            if not spans:
                began = min(began, since)  # the observer is told a moment after the end
                spans.append(("check", began, since - began))
            spans.append((_METHODS[method], since, wall))
            began = since + wall
        return [*spans, ("commit", began, max(0.0, ended - began))]

    def forget(self) -> None:
        """Set all weights to zero."""
        for target in self.weights().values():
            target.zero_()
        settle(self.device)

    def wrong(self, seed: int) -> int:
        """Count the elements that are not those of a version."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for name, target in self.weights().items():
            region = self.regions[name]
            assert region is not None
            count += self.parts.wrong(target, name, region, seed)
        return int(count)

    def engine_memory(self) -> int:
        return int(self.engine.extra_memory) if self.engine is not None else 0

    def weights(self) -> dict[str, torch.Tensor]:
        """Return this worker's tensors by the names of the weights that they are parts of."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def _needs(self, _manifest: Manifest) -> dict[str, Target | list[Target]]:
        def target(name: str, region: Region | None) -> Target | list[Target]:
            return [] if region is None else Target(region, self.model.get_parameter(name).detach())

        return {name: target(name, region) for name, region in self.regions.items()}

    def _watch_engine(self) -> None:
        """Time two methods of the worker's engine, in this process, until the GPU has done what they have begun."""
        config = load_config(self.scene.config)
        kind = type(self._loaded.create_worker_engine(config, ParallelConfig(device=str(self.device))))
        for name in _METHODS:
            setattr(kind, name, self._timed(name, getattr(kind, name)))

    def _timed(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, *arguments: Any) -> None:
            began, cpu = time.perf_counter(), time.thread_time()
            method(engine, *arguments)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device.index).synchronize()
            seconds = time.perf_counter() - began, time.thread_time() - cpu
            self._calls.append((name, began, seconds))
            self.engine = engine

        return timed
