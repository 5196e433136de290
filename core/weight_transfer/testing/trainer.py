"""The actor that plays trainers: each sender has a model of its own, which changes as soon as it was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.control.http_client import HttpChannel
from weight_transfer.sender import WeightSender
from weight_transfer.source import ModuleSource, WeightSource
from weight_transfer.testing.models import Model, PassingSource, Weight, cast, hashes, randomise
from weight_transfer.testing.resources import MemoryMark, held
from weight_transfer.testing.unpickling import watched_unpickling

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage

_AFTERWARDS = 999  # the seed of the bits that the model gets when it was sent


class RecordingChannel(HttpChannel):
    """Keeps what was sent to the worker."""

    def __init__(self, address: str, timeout: float) -> None:
        super().__init__(address, timeout=timeout)
        self.init_infos: list[dict[str, Any]] = []
        self.update_infos: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        self.init_infos.append(init_info)
        return super().init_weight_transfer_engine(init_info)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        self.update_infos.append(update_info)
        return super().update_weights(update_info)


class Trainer:
    """One sender with its model.

    Args:
        config: of the sender.
        workers: URLs.
        weights: the model's.
        device: the model's.
        passing: send copies that nobody keeps instead of the model's own tensors; only these can be armed.
        served: what the workers have, if the config casts; default is ``weights``.
    """

    def __init__(
        self,
        stage: Stage,
        config: dict[str, Any],
        workers: Sequence[str],
        weights: Sequence[Weight],
        *,
        device: str = "cpu",
        passing: bool = False,
        served: Sequence[Weight] | None = None,
    ) -> None:
        self._served = served
        self.model = Model(weights, 0, device)
        self._stage = stage
        self._block_at: int | None = None
        self._fail_at: int | None = None
        self._source: WeightSource = (
            PassingSource(self.model, self._before_each) if passing else ModuleSource(self.model)
        )
        self.channels = [RecordingChannel(url, float(config.get("timeout", 300))) for url in workers]
        self.sender = WeightSender(config, self.channels)

    def send(self, seed: int, version: int) -> dict[str, Any]:
        """Randomise, send, and randomise again at once: the source may change as soon as ``send`` returns."""
        randomise(self.model, seed)
        before = hashes(self.model)
        meant = before if self._served is None else hashes(cast(self.model, self._served))
        report = self.sender.send(self._source, version=version)
        left = hashes(self.model)
        randomise(self.model, _AFTERWARDS)
        return {
            "hashes": meant,
            "changed": [name for name in before if left[name] != before[name]],
            "workers": report.workers,
            "lost": report.lost,
            "extra_memory": report.extra_memory,
        }

    def arm(self, block_at: int | None = None, fail_at: int | None = None) -> None:
        """Choose the weight at which the source says so and waits for ``release``, or fails; None for none."""
        assert isinstance(self._source, PassingSource)
        self._block_at, self._fail_at = block_at, fail_at

    def _before_each(self, index: int) -> None:
        if index == self._block_at:
            self._stage.say("blocked")
            self._stage.await_command("release")
        if index == self._fail_at:
            raise RuntimeError("the source was told to fail")

    def infos(self) -> list[dict[str, Any]]:
        """Return, for each worker, all init and update infos that it was sent, and the size of the latter in bytes."""
        return [
            {
                "init": channel.init_infos,
                "update": channel.update_infos,
                "nbytes": [len(json.dumps(info)) for info in channel.update_infos],
            }
            for channel in self.channels
        ]

    def close(self) -> None:
        """Close the sender and its channels."""
        self.sender.close()
        for channel in self.channels:
            channel.close()


def main(stage: Stage, threads: int | None = None) -> None:
    """Serve commands; each names the sender that it is about, if there are several in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    trainers: dict[str, Trainer] = {}
    marks: list[MemoryMark] = []

    def open_(name: str, **spec: Any) -> None:
        trainers[name] = Trainer(stage, **spec)

    with watched_unpickling() as unpickled:
        stage.say("ready")
        stage.serve(
            {
                "open": open_,
                "close": lambda name: trainers.pop(name).close(),
                "close_sender": lambda name: trainers[name].sender.close(),
                "send": lambda name, **what: trainers[name].send(**what),
                "replace": lambda name, weight: trainers[name].model.replace(weight),
                "arm": lambda name, **at: trainers[name].arm(**at),
                "infos": lambda name: trainers[name].infos(),
                "held": lambda name: held(),
                "mark": lambda name: marks.append(MemoryMark()),
                "growth": lambda name: marks[-1].growth(),
                "unpickled": lambda name: list(unpickled),
            }
        )
        for trainer in trainers.values():
            trainer.close()
