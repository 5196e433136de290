"""The soak's actor that plays a worker: it serves, and reads what it serves all the time."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from processes import everything_held
from soak_clock import Clock
from soak_scene import TIMEOUT, Scene, digest_of, seed_of

import weight_transfer as wt
from weight_transfer.testing.models import digest
from weight_transfer.testing.resources import MemoryMark, threads
from weight_transfer.testing.shards import plain

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage

_PATIENCE = 1.0  # seconds that the reader waits for a version
_LATE = 1.0  # seconds that any wait may take beyond its deadline


class Loader:
    """Copies by name, as slowly as it is told to, and fails where it is told to."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._targets = dict(model.state_dict(keep_vars=True))
        self.pause = 0.0
        self.fail_at: int | None = None
        self._count = 0

    def arm(self, pause: float = 0.0, fail_at: int | None = None) -> None:
        """Choose the seconds of rest before each call, and the index of the weight at which it fails, once."""
        self.pause, self.fail_at, self._count = pause, fail_at, 0

    def __call__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        time.sleep(self.pause)
        for name, tensor in weights:
            if self._count == self.fail_at:
                self.fail_at = None
                raise RuntimeError("the loader was told to fail")
            self._count += 1
            with torch.no_grad():
                self._targets[name].copy_(tensor)


class Reader(threading.Thread):
    """Samples, and compares what it reads with what the version must be.

    Attributes:
        samples: how often it has, since `seen` was called, as for the others.
        torn: weights that were not those of the version under which they were served, a sentence each.
        hung: waits that did not end in time.
    """

    def __init__(self, receiver: wt.WeightReceiver, model: torch.nn.Module, scene: Scene) -> None:
        super().__init__(name="soak reader", daemon=True)
        self.samples = 0
        self.torn: list[str] = []
        self.hung: list[str] = []
        self.ends = threading.Event()
        self._receiver, self._model, self._scene = receiver, model, scene
        self._clock = Clock()
        self._expected: dict[int, str] = {}

    def run(self) -> None:
        chance = random.Random()
        while not self.ends.is_set():
            since = self._clock.now()
            try:
                with self._receiver.serving(_PATIENCE) as version:
                    first = digest(self._model)
                    time.sleep(chance.random() * 0.02)
                    seen = {first, digest(self._model)}
            except wt.TransferTimeoutError:
                late = self._clock.now() - since - _PATIENCE
                if late > _LATE:
                    self.hung.append(f"serving() came back {late:.1f} s after its deadline")
                continue
            except wt.LifecycleError:
                return
            self.samples += 1
            if seen != {self.expected(int(version))}:
                self.torn.append(f"version {version} was served with other weights than its own, {len(seen)} digests")
            time.sleep(0.03)

    def seen(self) -> dict[str, Any]:
        """Return what has been seen since the last call."""
        result = {"samples": self.samples, "torn": self.torn, "hung": self.hung}
        self.samples, self.torn, self.hung = 0, [], []
        return result

    def expected(self, version: int) -> str:
        """Return the digest of a version."""
        if version not in self._expected:
            self._expected = {version: digest_of(self._scene.weights, seed_of(self._scene.salt, version))}
        return self._expected[version]


def main(stage: Stage, scene: dict[str, Any], seed: int, mark: str) -> None:
    """Serve weights of a seed, as no version, and commands."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    os.environ["SOAK_MARK"] = mark
    played = Scene(**scene)
    marks: list[MemoryMark] = []
    source, _ = plain(played.weights, 0, 1, "cpu")
    model = source.module  # type: ignore[attr-defined]  # that of a module
    loader = Loader(model)
    clock = Clock()
    with wt.WeightReceiver(played.config, model, load_weights=None if played.in_place else loader) as receiver:
        reader = Reader(receiver, model, played)

        def settle() -> float:
            """Return the seconds until no update is open, or a negative number if that takes too long."""
            since = clock.now()
            while receiver.state is wt.ReceiverState.UPDATING:
                if clock.now() - since > TIMEOUT + _LATE:
                    return -1.0
                time.sleep(0.01)
            return clock.now() - since

        with wt.serve(receiver) as server:
            reader.start()
            stage.say(server.url)
            stage.serve(
                {
                    "served": lambda: [receiver.version, digest(model)],
                    "status": receiver.status,
                    "settle": settle,
                    "arm": loader.arm,
                    "held": everything_held,
                    "threads": lambda: list(threads().items()),
                    "mark": lambda: marks.append(MemoryMark()),
                    "growth": lambda: marks[-1].growth()["private"],
                    "seen": reader.seen,
                }
            )
            reader.ends.set()
