"""The processes of one episode of the soak: workers behind proxies, and trainers, which may be replaced."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from processes import signal_to

from weight_transfer.testing.actors import Actor
from weight_transfer.testing.proxy import Proxy

if TYPE_CHECKING:
    from soak_scene import Scene

LOST = 45.0
"""Seconds after which an answer is not waited for any longer."""

_SETTLING = 16.0  # seconds in which threads that are kept for the next call end, and connections that were replaced
_RESIDENT = 48 * 2**20  # bytes by which a process may grow: what malloc keeps for later
_stores = itertools.count()


class Trainer:
    """All ranks of one trainer.

    Args:
        scene: the episode's.
        workers: their URLs.
        folder: for the ranks' meeting.
        mark: of the episode, in the environment of what it starts.
    """

    def __init__(self, scene: Scene, workers: Sequence[str], folder: str, mark: str) -> None:
        store = f"{folder}/{next(_stores)}"
        spec: dict[str, Any] = {"scene": attrs.asdict(scene), "workers": workers, "store": store, "mark": mark}
        self.ranks = [Actor("soak_trainer", rank=rank, **spec) for rank in range(scene.ranks)]
        for rank in self.ranks:
            rank.ready()

    def begin(self, version: int, fail_at: int | None = None) -> None:
        """Have all ranks send."""
        for rank in self.ranks:
            rank.tell("send", version=version, fail_at=fail_at)

    def end(self) -> dict[str, Any]:
        """Return how it went on rank 0.

        Raises:
            AssertionError: a rank does not come back.
        """
        outcomes = [rank.reply(LOST) for rank in self.ranks]
        result: dict[str, Any] = outcomes[0]
        return result

    def signal(self, number: int) -> None:
        """Send a signal to all ranks."""
        for rank in self.ranks:
            signal_to(rank, number)

    def kill(self) -> None:
        """SIGKILL."""
        for rank in self.ranks:
            rank.kill()

    def stop(self) -> None:
        """Let it go."""
        for rank in self.ranks:
            rank.hang_up()
        for rank in self.ranks:
            rank.stop()


class Troupe:
    """Everybody in an episode.

    Attributes:
        trainer: the present one.
        workers: actors.
        proxies: one in front of each.
    """

    def __init__(self, scene: Scene, mark: str) -> None:
        self.scene, self._mark = scene, mark
        self._folder = tempfile.TemporaryDirectory()
        self._seeds = itertools.count(1)
        self._baselines: dict[Actor, dict[str, int]] = {}
        self._threads: dict[Actor, dict[int, str]] = {}
        self._hired: list[Actor] = []
        self.workers = [self._worker() for _ in range(scene.workers)]
        self.proxies = [Proxy(_port(worker)) for worker in self.workers]
        self.trainer = self.another_trainer()

    def another_trainer(self) -> Trainer:
        """Start a trainer of the same workers."""
        trainer = Trainer(self.scene, [proxy.url for proxy in self.proxies], self._folder.name, self._mark)
        self._hired += trainer.ranks
        return trainer

    def restart(self, index: int) -> None:
        """Kill a worker, and start another one in its place."""
        self.workers[index].kill()
        self.workers[index] = self._worker()
        self.proxies[index].port = _port(self.workers[index])

    def url(self, index: int) -> str:
        return self.proxies[index].url

    def mark(self) -> None:
        """From here on nobody who is there now may grow."""
        self._baselines, self._threads = {}, {}
        for actor in (*self.workers, *self.trainer.ranks):
            actor.ask("mark")
            self._baselines[actor] = actor.ask("held")
            self._threads[actor] = dict(actor.ask("threads"))

    def leaks(self) -> list[str]:
        """Return what processes that were there at `mark` have more of now, a sentence each."""
        found = []
        for actor in (*self.workers, *self.trainer.ranks):
            if actor not in self._baselines:
                continue
            until = time.monotonic() + _SETTLING
            while grown := _grown(self._baselines[actor], actor.ask("held")):
                if time.monotonic() > until:
                    found.append(f"{self._name(actor)} has {grown}; its threads: {self._changed_threads(actor)}")
                    break
                time.sleep(0.5)
            growth = actor.ask("growth")
            if growth > _RESIDENT:
                found.append(f"{self._name(actor)} has grown by {growth / 2**20:.0f} MiB")
        return found

    def show(self) -> None:
        """Have everybody write to standard error where they stand."""
        for actor in self._hired:
            if actor.is_alive:
                signal_to(actor, signal.SIGUSR1)
        time.sleep(1)

    def end(self) -> list[str]:
        """End everybody; return who is left, a sentence each."""
        self.trainer.stop()
        for worker in self.workers:
            worker.stop()
        for actor in self._hired:  # one may stand still where an episode was given up
            actor.kill()
        for proxy in self.proxies:
            proxy.close()
        self._folder.cleanup()
        until = time.monotonic() + _SETTLING
        while left := _marked(self._mark):
            if time.monotonic() > until:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                return [f"process {pid} is left: {command}" for pid, command in left.items()]
            time.sleep(0.2)
        return []

    def _changed_threads(self, actor: Actor) -> str:
        before, now = self._threads[actor], dict(actor.ask("threads"))
        begun = [name for thread, name in now.items() if thread not in before]
        ended = [name for thread, name in before.items() if thread not in now]
        return f"{len(now)}, begun {begun}, ended {ended}"

    def _name(self, actor: Actor) -> str:
        return f"worker {self.workers.index(actor)}" if actor in self.workers else "a trainer rank"

    def _worker(self) -> Actor:
        spec: dict[str, Any] = {"scene": attrs.asdict(self.scene), "seed": next(self._seeds), "mark": self._mark}
        worker = Actor("soak_worker", **spec)
        self._hired.append(worker)
        return worker.ready()


def _port(worker: Actor) -> int:
    return int(worker.hello.rpartition(":")[2])


def _grown(before: dict[str, int], now: dict[str, int]) -> str:
    return ", ".join(f"{now[what] - before[what]} more {what}" for what in before if now[what] > before[what])


def _marked(mark: str) -> dict[int, str]:
    """Return the processes that were started by actors of an episode, and run still."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"SOAK_MARK={mark}".encode() in Path(entry, "environ").read_bytes():
                found[int(entry.name)] = Path(entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
