"""One run of ``benchmarks/shards.py``: what is done in which order, compared, and timed."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.bench.troupe import VERSIONS, Troupe, slowest
from weight_transfer.bench.turns import in_turns

if TYPE_CHECKING:
    from weight_transfer.bench.member import Scene
    from weight_transfer.testing.actors import Actor

Rows = Mapping[str, tuple[float, float | None]]
"""By row the seconds of one round: wall time, and the CPU time of the thread where that is known."""


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
        super().__init__(scene, seconds, ("shards_trainer", "shards_worker"))
        self.seconds, self.until, self.repeat, self.gathers = seconds, time.monotonic() + life, repeat, gathers
        self.times: dict[str, list[tuple[float, float | None]]] = {}
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
        for version in VERSIONS:
            self._compare("ours", version, self._send)
            if not self.has_copies:
                self._prepare_copies()
            if not self.on_gpu:
                self.ask(self.workers, "hold_seed", seed=version)
            self._compare("plain copies", version, self._copy)
        self.open_limit()
        self._time([self._send, self._copy, self._reach_limit], self.repeat)
        self._compare("ours after the rounds", VERSIONS[-1], self._send)
        self.close_limits()
        self.ask(self.workers, "unpair")
        if self.gathers:
            self._measure_gathering()

    def _measure_gathering(self) -> None:
        self.ask(self.trainers, "disconnect")
        self.connect()
        for version in VERSIONS:
            self._compare("gathered", version, self._gather)
        self._time([self._gather], max(2, self.repeat // 3))

    def _compare(self, what: str, version: int, move: Callable[[], object]) -> None:
        """Bring a version; of the first one that comes in this way, keep the memory."""
        tell(f"bits of version {version}: {what}")
        memory = self.bring(version, move)
        self.facts["memory"].setdefault(what, memory)
        if what not in self.facts["bits_equal"]:
            self.facts["bits_equal"].append(what)

    def _time(self, steps: Sequence[Callable[[], Rows]], repeat: int) -> None:
        """Have steps take turns, and keep the seconds of their rows."""
        for rounds in in_turns({step.__name__: step for step in steps}, repeat, tell).values():
            for name in rounds[0]:
                self.times[name] = [rows[name] for rows in rounds]

    def _prepare_copies(self) -> None:
        self.has_copies = True
        if self.on_gpu:
            self.ask(self.workers, "map", shared=self.ask(self.trainers, "where"))
        else:
            self.ask(self.workers, "hold")

    @property
    def on_gpu(self) -> bool:
        return self.scene.trainers[0] != "cpu"

    def _send(self) -> Rows:
        report = self.send("send")
        engine = slowest(each["receive_regions"] for each in self.ask(self.workers, "engine_seconds"))
        self._require_counts(report)
        self.facts["report"] = report
        phases = {f"phase {phase}": (seconds, None) for phase, seconds in report["seconds"].items()}
        update = report["seconds"]["update"], None
        return {"send": (report["send"], None), "update": update, "engine": engine, **phases}

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

    def _gather(self) -> Rows:
        report = self.ask(self.trainers, "gather")[0]
        engine = slowest(each["receive_weights"] for each in self.ask(self.workers, "engine_seconds"))
        if report["kept"] or report["gathered"] != self.scene.parts.nbytes:
            raise SystemExit(f"gathering was to move all {self.scene.parts.nbytes} bytes whole: {report}")
        return {"gathered": (report["send"], None), "gathered, engine": engine}

    def _copy(self) -> Rows:
        return {"plain copies": slowest(self.ask(self.workers, "copy_plainly"))}

    def _reach_limit(self) -> Rows:
        return {"limit": self.run_limit()}


ROWS = ("limit", "plain copies", "engine", "update", "send", "gathered", "gathered, engine")


def summary(run: Run) -> dict[str, Any]:
    """Return the figures of a run, JSON-safe."""
    medians = {name: statistics.median(wall for wall, _ in values) for name, values in run.times.items()}
    most = max(run.facts["kept"])
    rows = {}
    for name in [name for name in ROWS if name in medians]:
        seconds, cpu = medians[name], [taken for _, taken in run.times[name] if taken is not None]
        rows[name] = {
            "median_s": seconds,
            "best_s": min(wall for wall, _ in run.times[name]),
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
