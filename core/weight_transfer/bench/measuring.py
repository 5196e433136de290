"""One case: what is sent between which processes, its figures, and where its time goes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from weight_transfer.bench.configurations import ModelShape
from weight_transfer.bench.member import Scene
from weight_transfer.bench.parts import Parts
from weight_transfer.bench.troupe import VERSIONS, Troupe

Figures = dict[str, Any]
"""JSON-safe."""

_BESIDE = 60.0  # seconds that a step may take beside its timeout: to fill weights, and to compare them


@attrs.frozen(kw_only=True)
class Case:
    """What is measured.

    Attributes:
        model: what is sent.
        config: of both sides; it names the backend.
        trainers: devices of the trainer's ranks, over which the weights are sharded.
        workers: devices of the workers.
        tensor_parallel: how many workers share one copy of the model.
        rounds: how often each thing is measured.
        timeout: seconds that an update may take.
    """

    model: ModelShape
    config: Mapping[str, Any]
    trainers: Sequence[str]
    workers: Sequence[str]
    tensor_parallel: int = 1
    rounds: int = 5
    timeout: float = 60.0

    @property
    def scene(self) -> Scene:
        """Who takes part, and what lies where."""
        on_gpus = {device: rank for rank, device in enumerate(self.trainers) if device != "cpu"}
        parts = Parts(
            shapes=self.model.shapes,
            trainers=len(self.trainers),
            shards=len(self.trainers),
            workers=len(self.workers),
            shares=self.tensor_parallel,
            beside=[on_gpus.get(device) for device in self.workers],
        )
        return Scene(
            parts=parts,
            config={**self.config, "timeout": self.timeout, "init_timeout": self.timeout},
            trainers=self.trainers,
            workers=self.workers,
        )


def measure(case: Case) -> Figures:
    """Start the processes of a case, compare bits, and time updates beside their limit in turns.

    Returns:
        ``bits_equal``, ``kept``, ``transport``, ``warnings``, ``extra_memory``, ``limit``, ``engine``, ``update``,
        ``send``, ``phases`` and ``timeline``: see the page of the command.

    Raises:
        AssertionError: a process has died or does not answer.
        WeightTransferError: an update failed, or brought other bytes.
    """
    scene = case.scene
    kept = [sum(scene.parts.by_rank(worker)) for worker in range(len(scene.workers))]
    with Troupe(scene, case.timeout + _BESIDE) as troupe:
        troupe.connect()
        for version in VERSIONS:
            troupe.bring(version)
        what = troupe.open_limit()
        limits: list[float] = []
        rounds: list[Figures] = []
        for number in range(case.rounds + 1):
            if number % 2:  # a busy system favours whoever has rested
                limits.append(_limit(troupe))
            rounds.append(_update(troupe))
            if not number % 2:
                limits.append(_limit(troupe))
        troupe.close_limit()
        troupe.bring(VERSIONS[0])
    limits, rounds = limits[1:], rounds[1:]
    limit = figures(limits, max(kept))
    timed = {name: [each[name] for each in rounds] for name in ("engine", "update", "send")}
    return {
        "bits_equal": True,
        "kept": kept,
        "transport": ", ".join(dict.fromkeys(rounds[-1]["transports"])),
        "warnings": rounds[-1]["warnings"],
        "extra_memory": rounds[-1]["extra_memory"],
        "limit": {"what": what, **limit},
        **{name: figures(seconds, max(kept), limit["median"]) for name, seconds in timed.items()},
        **{name: _median_round(rounds)[name] for name in ("phases", "timeline")},
    }


def figures(seconds: Sequence[float], nbytes: int, limit: float | None = None) -> Figures:
    """Return what is told of some measurements.

    Args:
        seconds: of each round.
        nbytes: that a worker received in it.
        limit: seconds of what bounds it.
    """
    median = statistics.median(seconds)
    told: Figures = {"median": median, "min": min(seconds), "max": max(seconds), "gbps": nbytes / median / 1e9}
    if limit is not None:
        told["of_limit"] = limit / median
    return {**told, "seconds": list(seconds)}


def _limit(troupe: Troupe) -> float:
    """Return the seconds of the slowest side."""
    return max(wall for wall, _ in troupe.run_limit())


def _update(troupe: Troupe) -> Figures:
    """Send once; return its seconds, and the spans of everybody from its beginning."""
    report = troupe.ask(troupe.trainers, "send")[0]  # the other ranks have the same one
    engines = troupe.ask(troupe.workers, "engine_seconds")
    began = report["began"]
    spans = troupe.ask(troupe.workers, "spans")
    phases = {"trainer 0": report["phases"]}
    phases |= {f"worker {number}": each for number, each in enumerate(troupe.ask(troupe.workers, "phases"))}
    rows = [_row("trainer 0", _spans(report), began)]
    rows += [_row(f"worker {number}", each, began) for number, each in enumerate(spans)]
    return {
        "send": report["send"],
        "update": report["seconds"]["update"],
        "engine": max(sum(wall for wall, _ in taken.values()) for taken in engines),
        "transports": list(report["transports"].values()),
        "warnings": list(report["warnings"]),
        "extra_memory": report["extra_memory"],
        "phases": phases,
        "timeline": {"seconds": report["send"], "rows": rows},
    }


def _spans(report: Figures) -> list[tuple[str, float, float]]:
    """Return the phases of a trainer rank, which follow each other."""
    began, spans = report["began"], []
    for phase, seconds in report["seconds"].items():
        spans.append((phase, began, seconds))
        began += seconds
    return spans


def _row(who: str, spans: Sequence[tuple[str, float, float]], began: float) -> Figures:
    told = [{"phase": phase, "begin": since - began, "seconds": seconds} for phase, since, seconds in spans]
    return {"who": who, "spans": told}


def _median_round(rounds: Sequence[Figures]) -> Figures:
    return sorted(rounds, key=lambda each: float(each["send"]))[(len(rounds) - 1) // 2]
