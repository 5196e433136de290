"""One case: what is sent between which processes, its figures, and where its time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from weight_transfer.bench.configurations import ModelShape
from weight_transfer.bench.member import Scene
from weight_transfer.bench.parts import Parts
from weight_transfer.bench.troupe import ROLES, VERSIONS, Troupe
from weight_transfer.bench.turns import in_turns

Figures = dict[str, Any]
"""JSON-safe."""

_BESIDE = 60.0  # seconds that a step may take beside its timeout


@attrs.frozen(kw_only=True)
class Case:
    """What is measured.

    Attributes:
        model: what is sent.
        config: of both sides; it names the backend.
        ways: what is compared with each other, see `Scene`; the limit and the timeline stand beside the first one.
        schemes: what is set beside them, see `Scene`.
        trainers: devices of the trainer's ranks, over which the weights are sharded.
        workers: devices of the workers.
        tensor_parallel: how many workers share one copy of the model.
        roles: modules of the trainer ranks' and of the workers' processes.
        rounds: how often each thing is measured.
        timeout: seconds that an update may take.
    """

    model: ModelShape
    config: Mapping[str, Any]
    trainers: Sequence[str]
    workers: Sequence[str]
    tensor_parallel: int = 1
    ways: Mapping[str, Mapping[str, Any]] = attrs.field(factory=lambda: {"send": {}})
    schemes: Mapping[str, str] = attrs.field(factory=dict)
    roles: tuple[str, str] = ROLES
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
            ways=self.ways,
            schemes=self.schemes,
        )


def measure(case: Case, tell: Callable[[str], None] = lambda _text: None) -> Figures:
    """Start the processes of a case, compare bits, and time updates beside their limit in turns.

    Args:
        case: what is measured.
        tell: is told each step.

    Returns:
        ``bits_equal``, ``kept``, ``transport``, ``warnings``, ``extra_memory``, ``memory``, ``limit``, ``engine``,
        ``update``, ``send``, ``phases`` and ``timeline``: see the page of the command. If there are further ways,
        ``ways`` with ``extra_memory``, ``engine``, ``update`` and ``send`` of each; if there are schemes, ``schemes``
        with figures of each.

    Raises:
        AssertionError: a process has died or does not answer.
        WeightTransferError: an update failed, or brought other bytes.
    """
    tell("starting the processes")
    with Troupe(case.scene, case.timeout + _BESIDE, case.roles) as troupe:
        tell("joining")
        troupe.connect()
        memory = {way: _brought(troupe, partial(troupe.send, way), way, tell) for way in case.ways}
        what, _ = troupe.open_limit()
        for scheme in case.schemes:
            tell(f"{scheme}: getting ready")
            if troupe.open_limit(scheme)[1]:
                _brought(troupe, partial(troupe.run_limit, scheme), scheme, tell)
        limits = {name: partial(troupe.run_limit, name or None) for name in ("", *case.schemes)}
        updates = {way: partial(_update, troupe, way) for way in case.ways}
        steps: dict[str, Callable[[], Any]] = {**limits, **updates}
        found = in_turns(steps, case.rounds, tell)
        troupe.close_limits()
        tell("comparing bits once more")
        first = next(iter(case.ways))
        troupe.bring(VERSIONS[0], partial(troupe.send, first))
    kept = [sum(case.scene.parts.by_rank(worker)) for worker in range(len(case.workers))]
    walls = {name: [wall for wall, _ in found[name]] for name in limits}
    limit = figures(walls[""], max(kept))
    rounds = found[first]
    beside = {way: _timed(found[way], max(kept), limit["median"]) for way in case.ways}
    schemes = {name: figures(walls[name], max(kept), limit["median"]) for name in case.schemes}
    return {
        "bits_equal": True,
        "kept": kept,
        "transport": ", ".join(dict.fromkeys(rounds[-1]["transports"])),
        "warnings": rounds[-1]["warnings"],
        "memory": memory[first],
        "limit": {"what": what, **limit},
        **beside.pop(first),
        **{name: _median_round(rounds)[name] for name in ("phases", "timeline")},
        **({"ways": beside} if beside else {}),
        **({"schemes": schemes} if schemes else {}),
    }


def _brought(troupe: Troupe, move: Callable[[], object], name: str, tell: Callable[[str], None]) -> Figures:
    """Bring each version in one way, and compare bits; return the memory that the first time took."""
    memory = []
    for version in VERSIONS:
        tell(f"{name}: comparing bits of version {version}")
        memory.append(troupe.bring(version, move))
    return memory[0]


def _timed(rounds: Sequence[Figures], nbytes: int, limit: float) -> Figures:
    told: Figures = {"extra_memory": rounds[-1]["extra_memory"]}
    for name in ("engine", "update", "send"):
        told[name] = figures([each[name] for each in rounds], nbytes, limit)
    return told


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


def _update(troupe: Troupe, way: str) -> Figures:
    """Send once; return its seconds, and the spans of everybody from its beginning."""
    report = troupe.send(way)
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
