"""One thing that goes wrong between a trainer and two workers, at a moment that hooks reach, and how soon it is known.

Who dies or stands still is the *victim*: the trainer, or one of the workers. What is measured is when the other side
knows: ``send`` raises, or the worker's update is over. Then everything is repaired, and the next update has to be good.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, get_args

import attrs
from processes import children, runs, stop

from weight_transfer.errors import ReplacedError, WeightTransferError
from weight_transfer.testing.actors import Actor, eventually
from weight_transfer.testing.models import weight

Backend = Literal["ipc", "nccl", "rdma"]
Victim = Literal["trainer", "worker"]
Fault = Literal["kill", "stop", "interrupt", "terminate"]
Phase = Literal["before init", "in init", "after init", "after start", "in update", "between finishes"]

WEIGHTS = [weight(f"layer{index}", "bfloat16", 128, 96) for index in range(6)]
LATE = 1.0  # seconds that anything may take beyond its deadline
SIGNALS: dict[Fault, signal.Signals] = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
}
_ENDING = 4.0  # seconds beyond the deadline in which a process ends: a moment for workers to let go of its memory, too
_FOR_EVER = 60.0  # seconds


@attrs.frozen(kw_only=True)
class Case:
    """What goes wrong.

    Attributes:
        backend: its name.
        victim: who.
        fault: one of `SIGNALS`.
        phase: when.
        takeover: for a trainer: another one sends at once, instead of waiting until the workers know.
        timeout: seconds of an update.
        init_timeout: seconds to join.
    """

    backend: Backend
    victim: Victim
    fault: Fault
    phase: Phase
    takeover: bool = False
    timeout: float = 3.0
    init_timeout: float = 6.0

    @property
    def deadline(self) -> float:
        """Seconds in which the other side has to know.

        A worker that is gone before the start is waited for; who takes over has to join.
        """
        gone = self.victim == "worker" and self.fault != "stop" and self.phase == "after init"
        return self.init_timeout if gone or self.takeover or self.phase in ("before init", "in init") else self.timeout

    def __str__(self) -> str:
        after = ", another one takes over" if self.takeover else ""
        return f"{self.backend}: {self.fault} the {self.victim} {self.phase}{after}"


@attrs.frozen(kw_only=True)
class Outcome:
    """What was measured.

    Attributes:
        case: what went wrong.
        seconds: until the other side knew; until the update of another trainer was good, if it takes over; None if
            there is nothing to know.
        error: what the other side said.
        recovery: seconds that the next update took.
    """

    case: Case
    seconds: float | None
    error: str
    recovery: float

    @property
    def is_late(self) -> bool:
        """Whether a deadline was overrun."""
        return self.seconds is not None and self.seconds > self.case.deadline + LATE


def cases(backends: Sequence[Backend], faults: Sequence[Fault], timeout: float, init_timeout: float) -> Iterator[Case]:
    """Return all cases of some backends and faults."""
    for backend in backends:
        for victim in get_args(Victim):
            for fault in faults:
                for phase in get_args(Phase):
                    if victim == "worker" and phase == "in init":
                        continue
                    case = Case(
                        backend=backend,
                        victim=victim,
                        fault=fault,
                        phase=phase,
                        timeout=timeout,
                        init_timeout=init_timeout,
                    )
                    yield case
                    if victim == "trainer":
                        yield attrs.evolve(case, takeover=True)


def play(case: Case) -> Outcome:
    """Let it happen.

    Raises:
        AssertionError: somebody hangs, or other bytes arrived than were sent.
    """
    with ExitStack() as stack:
        scene = _Scene(case, stack)
        scene.bring_about()
        with scene.struck():
            since = time.monotonic()
            seconds, error = scene.notice(since)
        scene.repair()
        return Outcome(case=case, seconds=seconds, error=error, recovery=scene.update())


class _Scene:
    """A trainer and two workers."""

    def __init__(self, case: Case, stack: ExitStack) -> None:
        self._case, self._stack = case, stack
        self._config = {"backend": case.backend, "timeout": case.timeout, "init_timeout": case.init_timeout}
        self._workers = [self._worker() for _ in range(2)]
        self._trainer = self._another_trainer()
        self._victim = 1
        self._version = 0

    def bring_about(self) -> None:
        """Come to the moment."""
        case, trainer, victim = self._case, self._trainer, self._workers[self._victim]
        if case.phase == "before init":
            return
        if case.phase in ("in update", "between finishes"):
            self.update()
        if case.phase == "in update" and case.victim == "worker":
            victim.ask("arm", name="w", block_at=1)
            self._send(trainer)
            assert victim.reply() == "blocked"
            return
        if case.phase == "in update":
            trainer.ask("arm", name="t", block_at=len(WEIGHTS) // 2)
        else:
            calls = {"in init": "init", "after init": "start", "after start": "update", "between finishes": "finish"}
            trainer.ask("hold", name="t", at=calls[case.phase])
        self._send(trainer)
        assert trainer.reply() in ("held", "blocked")
        if case.phase == "between finishes":  # one of the two calls is held
            assert eventually(lambda: self._version in self._served(), _FOR_EVER)
            self._victim = 1 - self._served().index(self._version)
        if case.phase == "in init":
            assert eventually(lambda: any(worker.ask("busy", name="w") for worker in self._workers), _FOR_EVER)

    @contextmanager
    def struck(self) -> Iterator[None]:
        """Strike, and let one who was stopped go on afterwards."""
        case = self._case
        hit = self._trainer if case.victim == "trainer" else self._workers[self._victim]
        all_of_it = [hit.pid, *children(hit.pid)]
        if case.fault == "stop":
            stop(hit.pid)
        else:
            os.kill(hit.pid, SIGNALS[case.fault])
        try:
            if case.victim == "worker" and case.phase not in ("before init", "in update"):
                self._trainer.tell("release")
            yield
        finally:
            if case.fault == "stop":
                os.kill(hit.pid, signal.SIGCONT)
        if case.fault != "stop":
            ended = eventually(lambda: not any(map(runs, all_of_it)), case.timeout + _ENDING)
            assert ended, "the process, or one that it had started, is left behind"

    def notice(self, since: float) -> tuple[float | None, str]:
        """Return after how many seconds the other side knows, and what it says."""
        case = self._case
        if case.victim == "worker":
            if case.phase == "before init":
                self._send(self._trainer)
            error = self._trainer.error(_FOR_EVER)
            seconds = time.monotonic() - since
            assert getattr(error, "peer", None) == self._workers[self._victim].hello, (
                f"somebody else is blamed: {error}"
            )
            return seconds, f"{type(error).__name__}: {error}"
        if case.takeover:
            stale, self._trainer = self._trainer, self._another_trainer()
            since = time.monotonic()
            self.update(_FOR_EVER)
            self._stale = stale
            return time.monotonic() - since, ""
        if case.phase in ("before init", "after init"):
            return None, ""
        assert eventually(lambda: not any(map(self._is_open, self._workers)), _FOR_EVER)
        seconds = time.monotonic() - since
        errors = [worker.ask("status", name="w")["error"] for worker in self._workers]
        if case.phase == "in init" and "ready" in map(self._state, self._workers):  # it can join without the trainer
            return None, ""
        assert any(errors), "no worker has noticed anything"
        return seconds, str(next(filter(None, errors)))

    def repair(self) -> None:
        """Have everybody there again."""
        case = self._case
        if case.victim == "trainer":
            if not case.takeover:
                self._stale, self._trainer = self._trainer, self._another_trainer()
            if case.fault == "stop":
                self._wake(self._stale)
        elif case.fault != "stop":
            victim = self._workers[self._victim]
            self._workers[self._victim] = self._worker(int(victim.hello.rpartition(":")[2]))
        else:
            victim = self._workers[self._victim]
            victim.ask("release", name="w")
            victim.ask("arm", name="w")
            assert eventually(lambda: self._state(victim) != "updating", self._case.timeout + LATE)

    def _wake(self, stale: Actor) -> None:
        """Let the stale trainer go on where it stood still; if it had begun to send, it gives up."""
        if self._case.phase == "before init":
            return
        stale.tell("release")
        if self._case.takeover:
            error = stale.error(_FOR_EVER)
            assert isinstance(error, ReplacedError), f"the stale trainer was not refused: {error!r}"
        elif self._case.phase in ("in init", "after init"):  # nothing had begun: it may join anew, and send
            with suppress(WeightTransferError):
                stale.reply(_FOR_EVER)
        else:
            stale.error(_FOR_EVER)

    def update(self, within: float = _FOR_EVER) -> float:
        """Make an update that has to be good; return the seconds that it took."""
        since = time.monotonic()
        self._send(self._trainer)
        sent = self._trainer.reply(within)
        seconds = time.monotonic() - since
        for worker in self._workers:
            assert worker.ask("hashes", name="w") == sent["hashes"], "other bytes arrived than were sent"
            assert worker.ask("status", name="w")["version"] == self._version
        return seconds

    def _send(self, trainer: Actor) -> None:
        self._version += 1
        trainer.tell("send", name="t", seed=self._version, version=self._version)

    def _served(self) -> list[Any]:
        return [worker.ask("status", name="w")["version"] for worker in self._workers]

    def _is_open(self, worker: Actor) -> bool:
        return self._state(worker) == "updating" or worker.ask("busy", name="w") is not None

    def _state(self, worker: Actor) -> Any:
        return worker.ask("status", name="w")["state"]

    def _worker(self, port: int = 0) -> Actor:
        actor = Actor("weight_transfer.testing.worker", threads=1)
        self._stack.callback(actor.stop)
        actor.ready()
        actor.hello = actor.ask("open", name="w", config=self._config, weights=WEIGHTS, port=port)
        return actor

    def _another_trainer(self) -> Actor:
        actor = Actor("weight_transfer.testing.trainer", threads=1)
        self._stack.callback(actor.stop)
        urls = [worker.hello for worker in self._workers]
        actor.ready().ask("open", name="t", config=self._config, workers=urls, weights=WEIGHTS, passing=True)
        return actor
