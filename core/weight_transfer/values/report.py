"""What one update cost, and what the workers noticed in it."""

from __future__ import annotations

from typing import Any

import attrs

from weight_transfer.values.events import Version


@attrs.frozen
class WorkerReport:
    """What the engine of a worker, or of each worker of a replica, noticed in an update.

    Attributes:
        transport: how the bytes travelled, such as ``"shm (zero-copy over cma/memory)"``; empty if nobody tells.
        warnings: what is amiss though the update is good, a sentence each.
    """

    transport: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: object) -> WorkerReport:
        """Read the answer to ``update_weights``; a foreign server's answer may hold anything else, or nothing."""
        fields = answer if isinstance(answer, dict) else {}
        transport, warnings = fields.get("transport"), fields.get("warnings")
        return cls(
            transport if isinstance(transport, str) else "",
            tuple(map(str, warnings)) if isinstance(warnings, (list, tuple)) else (),
        )

    @classmethod
    def joint(cls, reports: list[WorkerReport]) -> WorkerReport:
        """Say once what several say alike."""
        transports = dict.fromkeys(report.transport for report in reports if report.transport)
        warnings = dict.fromkeys(warning for report in reports for warning in report.warnings)
        return cls(", ".join(transports), tuple(warnings))

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return {"transport": self.transport, "warnings": list(self.warnings)}


@attrs.frozen(kw_only=True)
class TransferReport:
    """The result of :meth:`WeightSender.send <weight_transfer.WeightSender.send>`.

    Attributes:
        backend: the backend's name.
        version: the version that the workers now serve.
        target: which of the receivers' models it is about.
        nbytes: bytes of one copy of what was sent: all of the weights, or a part.
        params: number of parameters that were sent.
        workers: addresses of the workers that serve the version.
        lost: ``(address, error)`` of workers that failed, if ``on_worker_failure = "continue"``.
        seconds: wall time by phase (``init``, ``start``, ``update``, ``finish``).
        extra_memory: bytes of staging memory that the trainer's engine holds.
        transports: how the bytes travelled to each worker, by its address, as far as the backend tells.
        warnings: what is amiss though the update is good, such as a link far below its rate; a sentence each, which
            begins with the worker's address.
    """

    backend: str
    version: Version
    target: str = "model"
    nbytes: int
    params: int
    workers: tuple[str, ...]
    lost: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float]
    extra_memory: int
    transports: dict[str, str] = attrs.field(factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Wall time of all phases."""
        return sum(self.seconds.values())

    @property
    def gbps(self) -> float:
        """GB/s (10**9 bytes) that each worker received in the update phase."""
        return self.nbytes / self.seconds["update"] / 1e9 if self.seconds.get("update") else 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in self.seconds.items())
        lost = f", lost {', '.join(peer for peer, _ in self.lost)}" if self.lost else ""
        over = ", ".join(dict.fromkeys(self.transports.values()))
        warnings = "".join(f"; warning: {warning}" for warning in self.warnings)
        return (
            f"version {self.version}: {sized(self.nbytes)} to {counted(len(self.workers))} over {self.backend}"
            f"{f', {over},' if over else ''} at {sized(self.gbps * 1e9)}/s ({phases}){lost}{warnings}"
        )


def sized(nbytes: float) -> str:
    """Return bytes in the unit that suits them, with three digits: ``56 B``, ``8.66 MB``, ``16.1 GB``."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "KB")):
        if nbytes >= 0.9995 * 10**power:
            value = nbytes / 10**power
            return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f} {unit}"
    return f"{nbytes:.0f} B"


def counted(workers: int) -> str:
    """Return ``1 worker`` or ``2 workers``."""
    return "1 worker" if workers == 1 else f"{workers} workers"
