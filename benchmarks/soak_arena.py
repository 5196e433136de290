"""One backend's part of the soak: episodes of updates, most of them good, and of faults."""

from __future__ import annotations

import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from processes import children, runs, signal_to
from soak_faults import faults_in
from soak_scene import INIT_TIMEOUT, TIMEOUT, choose, digest_of, seed_of
from soak_troupe import Trainer, Troupe

from weight_transfer.testing.actors import Actor, eventually

_LATE = 1.0  # seconds that anything may take beyond its deadline
_FAULTS = 0.13  # part of the updates
_ROUNDS = 80  # of an episode
_TRIES = 3
_ENDING = TIMEOUT + 4.0  # seconds: an update is aborted, and workers get a moment to let go of memory
_AHEAD = 3  # good updates before what is held is counted, and afterwards


class Failed(Exception):  # noqa: N818  (a finding)
    """An episode cannot go on."""


class Arena(threading.Thread):
    """Plays episodes until it is told to end.

    Args:
        backend: its name.
        seed: of all that is chosen.
        until: moment of the monotonic clock.

    Attributes:
        counts: what has happened.
        failures: good updates that needed another try.
        slowest: seconds by which the latest ``send`` came back after its deadline.
        chance: chooses.
        version: the last one that was sent.
        findings: what must not happen, a sentence each, by kind: ``torn``, ``hung``, ``leaked``.
    """

    def __init__(self, backend: str, seed: int, until: float) -> None:
        super().__init__(name=f"soak {backend}", daemon=True)
        self.backend = backend
        self.counts: Counter[str] = Counter()
        self.findings: dict[str, list[str]] = {"torn": [], "hung": [], "leaked": []}
        self.failures: list[str] = []
        self.slowest = 0.0
        self.chance = random.Random(f"{backend} {seed}")
        self.version = 0
        self._fault = "nothing"
        self._mark = f"{backend}-{seed}-{time.time_ns()}"
        self._until = until
        self._episodes = 0
        self._where = backend

    def run(self) -> None:
        try:
            while time.monotonic() < self._until:
                self._episode()
        except Exception as error:  # noqa: BLE001  (nobody else would hear of it)
            traceback.print_exc()
            self.find("hung", f"the soak itself failed: {error!r}")

    def _episode(self) -> None:
        self._episodes += 1
        self._fault = "nothing"
        scene = choose(self.backend, self.chance)
        self._where = f"{self.backend}, episode {self._episodes} ({scene.layout})"
        troupe = Troupe(scene, f"{self._mark}-{self._episodes}")
        try:
            self._play(troupe)
        except Failed:
            pass
        except Exception as error:  # noqa: BLE001  (an actor does not answer)
            traceback.print_exc()
            troupe.show()
            self.find("hung", repr(error))
        finally:
            self._look(troupe)
            for left in troupe.end():
                self.find("leaked", left)

    def _play(self, troupe: Troupe) -> None:
        for _ in range(_AHEAD):
            self._update(troupe)
        troupe.mark()
        for _ in range(_ROUNDS):
            if time.monotonic() > self._until:
                break
            if self.chance.random() < _FAULTS:
                kind = self.chance.choice(faults_in(troupe.scene))
                self._fault = kind.__name__
                self._look(troupe)  # whoever is killed tells nothing
                kind(self, troupe)
                self.counts[f"fault: {kind.__name__}"] += 1
                self.recover(troupe)
                self._look(troupe)
            else:
                self._fault = "nothing"
                self._update(troupe)
        self._fault = "the end"
        for _ in range(_AHEAD):
            self._update(troupe)
        for leak in troupe.leaks():
            self.find("leaked", leak)

    # What a fault is made of.

    def end(self, actors: list[Actor]) -> None:
        """Have processes end, and see that they and their children do."""
        number = self.chance.choice([signal.SIGINT, signal.SIGTERM])
        pids = [pid for actor in actors for pid in (actor.pid, *children(actor.pid))]
        for actor in actors:
            signal_to(actor, number)
        if not eventually(lambda: not any(map(runs, pids)), _ENDING):
            self.find("hung", f"{signal.Signals(number).name} did not end a process within {_ENDING:g} s")

    def one(self, troupe: Troupe) -> int:
        """Choose a worker."""
        return self.chance.randrange(len(troupe.workers))

    def slowed(self, troupe: Troupe) -> None:
        """Let updates take longer, mostly, so that what comes meanwhile hits them."""
        pause = self.chance.choice([0.0, 0.01, 0.1])
        for worker in troupe.workers:
            worker.ask("arm", pause=pause)

    def wait(self) -> None:
        """Let an update come to some moment."""
        time.sleep(self.chance.choice([0.0, 0.01, 0.1, 0.3]) * self.chance.random())

    def begin(self, troupe: Troupe, fail_at: int | None = None) -> None:
        """Have the trainer send the next version."""
        self.version += 1
        self.counts["updates"] += 1
        troupe.trainer.begin(self.version, fail_at)

    def ended(self, trainer: Trainer) -> dict[str, Any]:
        """Return how that went."""
        outcome: dict[str, Any] = trainer.end()
        self.counts["versions published" if outcome["error"] is None else "updates that failed"] += 1
        return outcome

    def during(self, troupe: Troupe, happen: Callable[[], object]) -> dict[str, Any]:
        """Have something happen in an update, and return how that went."""
        self.begin(troupe)
        self.wait()
        happen()
        return self.ended(troupe.trainer)

    def bounded(self, outcome: dict[str, Any], rejoins: bool = False, ranks: int = 1) -> None:
        """See that ``send`` came back in time."""
        bound = TIMEOUT * (2 if ranks > 1 else 1) + (INIT_TIMEOUT if rejoins or outcome["joins"] else 0.0)
        self.slowest = max(self.slowest, outcome["seconds"] - bound)
        if outcome["seconds"] > bound + _LATE:
            self.find("hung", f"send came back after {outcome['seconds']:.1f} s of {bound:g}: {outcome['error']}")

    def settled(self, worker: Actor) -> None:
        """See that a worker has no update open beyond its deadline."""
        if worker.ask("settle") < 0:
            self.find("hung", f"a worker's update was open {_LATE:g} s after its deadline")

    def recover(self, troupe: Troupe) -> None:
        """See that everything is as good as ever."""
        for worker in troupe.workers:
            worker.ask("arm")
        tries = self._update(troupe, rejoins=True)
        self.counts["recoveries at the first try" if tries == 1 else "recoveries at a later try"] += 1

    def _update(self, troupe: Troupe, rejoins: bool = False) -> int:
        """Make an update that has to be good; return how many tries it took: on a busy machine one may time out."""
        for tries in range(1, _TRIES + 1):
            self.begin(troupe)
            outcome = self.ended(troupe.trainer)
            self.bounded(outcome, rejoins or tries > 1, troupe.scene.ranks)
            failure = outcome["error"] or outcome["lost"]
            if not failure:
                self._compare(troupe, outcome)
                return tries
            self.failures.append(f"{self._where}, version {self.version}, after {self._fault}: {failure}")
            print(f"\n{self.failures[-1]}", flush=True)
        self.find("hung", f"does not recover: {failure}")
        raise Failed

    def _compare(self, troupe: Troupe, outcome: dict[str, Any]) -> None:
        """See that all workers that count as good have what was sent."""
        expected = [self.version, digest_of(troupe.scene.weights, seed_of(troupe.scene.salt, self.version))]
        for index, worker in enumerate(troupe.workers):
            if troupe.url(index) in outcome["workers"] and worker.ask("served") != expected:
                self.find("torn", f"a good report over other weights, version {self.version}")

    def _look(self, troupe: Troupe) -> None:
        """Take down what the readers have seen."""
        for worker in troupe.workers:
            try:
                seen = worker.ask("seen")
            except (AssertionError, OSError):  # it was killed, and the episode has ended there
                continue
            self.counts["samples"] += seen["samples"]
            for kind in ("torn", "hung"):
                for text in seen[kind]:
                    self.find(kind, text)

    def find(self, kind: str, text: str) -> None:
        """Take down what must not happen."""
        found = f"{self._where}, version {self.version}, after {self._fault}: {text}"
        self.findings[kind].append(found)
        print(f"\n{kind}: {found}", flush=True)
