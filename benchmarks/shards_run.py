"""One run of ``benchmarks/shards.py``: what is done in which order, compared, and timed."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.bench.troupe import VERSIONS, Troupe

if TYPE_CHECKING:
    from weight_transfer.bench.member import Scene
    from weight_transfer.testing.actors import Actor


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Run(Troupe):
    """One run of the benchmark.

    Args:
        scene: who takes part.
        seconds: that one step may take.
        life: seconds that the run may take.
        repeat: rounds that count.
        gathers: whether gathering is measured, too.
    """

    def __init__(self, scene: Scene, seconds: float, life: float, repeat: int, gathers: bool) -> None:
        super().__init__(scene, seconds, "shards_trainer", "shards_worker")
        self.seconds, self.until, self.repeat, self.gathers = seconds, time.monotonic() + life, repeat, gathers
        self.times: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {"bits_equal": [], "memory": {}}
        self.has_copies = False
        self.taken = [scene.parts.by_rank(worker) for worker in range(len(scene.workers))]
        has_replicas = len(scene.trainers) > scene.parts.shards
        self.choice = len(scene.workers) * scene.parts.largest_piece if has_replicas else 0

    def ask(self, actors: Sequence[Actor], command: str, **arguments: Any) -> list[Any]:
        """As a troupe's; the time of the whole run counts, too, and if it is up, everybody shows where it stands."""
        self.patience = max(0.0, min(self.seconds, self.until - time.monotonic()))
        try:
            return super().ask(actors, command, **arguments)
        except AssertionError:
            for actor in self.everyone:
                with suppress(ProcessLookupError):
                    os.kill(actor.pid, signal.SIGABRT)
            raise

    def measure(self) -> None:
        """Do everything."""
        self.connect()
        self.ask(self.workers, "forget")
        for version in VERSIONS:
            tell(f"bits of version {version}: ours, plain copies")
            self._bring(version, self._send, "ours")
            if not self.has_copies:
                self._prepare_copies()
            if not self.on_gpu:
                self.ask(self.workers, "hold_seed", seed=version)
            self.ask(self.workers, "forget")
            self._copy()
            self._require_bits("plain copies", version)
        self.open_limit()
        self.times.clear()
        self.cpu.clear()
        steps = (self._send, self._copy, self._reach_limit)
        for number in range(self.repeat + 1):
            tell(f"round {number} of {self.repeat}")
            for step in range(len(steps)):  # a system that is busy favours whoever has rested
                steps[(number + step) % len(steps)]()
        self.times = {name: values[1:] for name, values in self.times.items()}
        self.cpu = {name: values[1:] for name, values in self.cpu.items()}
        self.ask(self.workers, "forget")
        self.ask(self.trainers, "send")
        self._require_bits("ours after the rounds", VERSIONS[-1])
        self.close_limit()
        self.ask(self.workers, "unpair")
        if self.gathers:
            self._measure_gathering()

    def _measure_gathering(self) -> None:
        self.ask(self.trainers, "disconnect")
        self.connect()
        self.ask(self.workers, "forget")
        for version in VERSIONS:
            tell(f"bits of version {version}: gathered")
            self._bring(version, self._gather, "gathered")
        for name in ("gathered", "gathered, engine"):
            self.times[name].clear()
        for number in range(max(2, self.repeat // 3)):
            tell(f"gathered: round {number + 1}")
            self._gather()

    def _bring(self, version: int, move: Callable[[], None], what: str) -> None:
        """Fill the trainer's shards, move them, and compare all bits; the first time, watch the memory."""
        self.ask(self.trainers, "fill", seed=version)
        is_first = what not in self.facts["memory"]
        if is_first:
            self.ask(self.everyone, "tidy")
            self.ask(self.everyone, "before")
        move()
        if is_first:
            memory = self.ask(self.everyone, "memory")
            self.facts["memory"][what] = dict(zip([actor.called for actor in self.everyone], memory, strict=True))
        self._require_bits(what, version)

    def _prepare_copies(self) -> None:
        self.has_copies = True
        if self.on_gpu:
            self.ask(self.workers, "map", shared=self.ask(self.trainers, "where"))
        else:
            self.ask(self.workers, "hold")

    @property
    def on_gpu(self) -> bool:
        return self.scene.trainers[0] != "cpu"

    def _require_bits(self, what: str, version: int) -> None:
        self.require_bits(version)
        if what not in self.facts["bits_equal"]:
            self.facts["bits_equal"].append(what)

    def _note(self, row: str, seconds: float, cpu: float | None = None) -> None:
        self.times.setdefault(row, []).append(seconds)
        if cpu is not None:
            self.cpu.setdefault(row, []).append(cpu)

    def _note_slowest(self, row: str, taken: Sequence[tuple[float, float]]) -> None:
        self._note(row, max(wall for wall, _ in taken), max(cpu for _, cpu in taken))

    def _send(self) -> None:
        report = self.ask(self.trainers, "send")[0]
        taken = [each["receive_regions"] for each in self.ask(self.workers, "engine_seconds")]
        self._note("send", report["send"])
        self._note("update", report["seconds"]["update"])
        self._note_slowest("engine", taken)
        for phase, seconds in report["seconds"].items():
            self._note(f"phase {phase}", seconds)
        self._require_counts(report)
        self.facts["report"] = report

    def _require_counts(self, report: dict[str, Any]) -> None:
        """See that exactly what the workers keep was moved, and from where it lies.

        Which of equally near replicas gives a piece is the planner's choice: `choice` bytes of a rank, a piece for each
        worker, for they must share the bytes evenly.
        """
        kept = [sum(sizes) for sizes in self.taken]
        expected = [sum(sizes) for sizes in zip(*self.taken, strict=True)]
        given, shards = list(report["given"]), self.scene.parts.shards
        of_shards = [[sum(ranks[shard::shards]) for shard in range(shards)] for ranks in (given, expected)]
        uneven = max(abs(own - other) for own, other in zip(given, expected, strict=True))
        are_right = list(report["kept"].values()) == kept and of_shards[0] == of_shards[1] and uneven <= self.choice
        if not are_right or report["gathered"]:
            raise SystemExit(
                f"workers keep {kept}, of which the ranks give {expected}; the report says {report['kept']} were kept, "
                f"{report['given']} given, {report['gathered']} gathered"
            )
        self.facts |= {"kept": kept, "given": given, "taken": self.taken}

    def _gather(self) -> None:
        report = self.ask(self.trainers, "gather")[0]
        taken = [each["receive_weights"] for each in self.ask(self.workers, "engine_seconds")]
        self._note("gathered", report["send"])
        self._note_slowest("gathered, engine", taken)
        if report["kept"] or report["gathered"] != self.scene.parts.nbytes:
            raise SystemExit(f"gathering was to move all {self.scene.parts.nbytes} bytes whole: {report}")

    def _copy(self) -> None:
        self._note_slowest("plain copies", self.ask(self.workers, "copy_plainly"))

    def _reach_limit(self) -> None:
        self._note_slowest("limit", self.run_limit())


ROWS = ("limit", "plain copies", "engine", "update", "send", "gathered", "gathered, engine")


def summary(run: Run) -> dict[str, Any]:
    """Return the figures of a run, JSON-safe."""
    medians = {name: statistics.median(values) for name, values in run.times.items()}
    most = max(run.facts["kept"])
    rows = {}
    for name in [name for name in ROWS if name in medians]:
        seconds, cpu = medians[name], run.cpu.get(name)
        rows[name] = {
            "median_s": seconds,
            "best_s": min(run.times[name]),
            "GBps": most / seconds / 1e9,
            "of_limit": medians["limit"] / seconds,
            "of_copies": medians["plain copies"] / seconds,
            "cpu_s": statistics.median(cpu) if cpu else None,
        }
    phases = {name.removeprefix("phase "): value for name, value in medians.items() if name.startswith("phase ")}
    facts = {name: value for name, value in run.facts.items() if not name.startswith("report")}
    last = run.facts["report"]
    return {
        "rows": rows,
        "phases_s": phases,
        **facts,
        "gathered_bytes": last["gathered"],
        "transports": sorted(set(last["transports"].values())),
        "warnings": last["warnings"],
    }
