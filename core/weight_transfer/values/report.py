"""What one update cost, and what the workers noticed in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, Self, TypeGuard

import attrs

from weight_transfer.values.events import PHASES, Version


@attrs.frozen(kw_only=True)
class Receipt:
    """What one worker has received in an update.

    Attributes:
        worker: its number among all workers, from 0.
        names: how many weights it has received, or parts of.
        nbytes: bytes of these.
        digest: 128 bits over all names, dtypes, shapes and bytes as hexadecimal digits; empty if nothing was compared.
            Workers that received the same have the same one. Of weights that go by region it is of what the worker
            keeps, piece by piece.
        tables: what the digest is made of: the `DigestTable` of what came whole, then of what came from each trainer
            rank by region, as text; empty where nothing did.
    """

    worker: int
    names: int
    nbytes: int
    digest: str = ""
    tables: tuple[str, ...] = attrs.field(default=(), repr=False)

    @classmethod
    def of(cls, answer: object) -> Self | None:
        """Read what `to_dict` gave; None if it is something else."""
        fields = answer if isinstance(answer, dict) else {}
        worker, names, nbytes = fields.get("worker"), fields.get("names"), fields.get("nbytes")
        digest, tables = fields.get("digest", ""), fields.get("tables", [])
        if not (_is_count(worker) and _is_count(names) and _is_count(nbytes) and isinstance(digest, str)):
            return None
        if not isinstance(tables, list) or not all(isinstance(table, str) for table in tables):
            return None
        return cls(worker=worker, names=names, nbytes=nbytes, digest=digest, tables=tuple(tables))

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        compared = {"digest": self.digest, "tables": list(self.tables)} if self.digest else {}
        return {"worker": self.worker, "names": self.names, "nbytes": self.nbytes, **compared}


@attrs.frozen
class WorkerReport:
    """What the engine of a worker, or of each worker of a replica, noticed in an update.

    Attributes:
        transport: how the bytes travelled, such as ``"shm (zero-copy over cma/memory)"``; empty if nobody tells.
        warnings: what is amiss though the update is good, a sentence each.
        kept: bytes of the weights that went by region, as far as the workers keep them.
        moved: bytes that came by region, by trainer rank; empty if all went whole.
        asks_again: whether it keeps other regions from now on than it has said, so that the trainer has to ask again
            before the next update.
        receipts: what each worker has received; empty if nobody tells.
        seconds: of each of the `PHASES` so far; empty if nobody tells.
        published: whether the version is served already, as was decided while it came.
    """

    transport: str = ""
    warnings: tuple[str, ...] = ()
    kept: int = 0
    moved: tuple[int, ...] = ()
    asks_again: bool = False
    receipts: tuple[Receipt, ...] = ()
    seconds: Mapping[str, float] = attrs.field(factory=dict, hash=False)
    published: bool = False

    @classmethod
    def of(cls, answer: object) -> WorkerReport:
        """Read the answer to ``update_weights``; a foreign server's answer may hold anything else, or nothing."""
        fields = answer if isinstance(answer, dict) else {}
        transport, warnings = fields.get("transport"), fields.get("warnings")
        kept, moved = fields.get("kept"), fields.get("moved")
        counts = tuple(moved) if isinstance(moved, (list, tuple)) else ()
        said = fields.get("receipts")
        receipts = map(Receipt.of, said if isinstance(said, (list, tuple)) else ())
        return cls(
            transport if isinstance(transport, str) else "",
            tuple(map(str, warnings)) if isinstance(warnings, (list, tuple)) else (),
            kept if _is_count(kept) else 0,
            counts if all(map(_is_count, counts)) else (),
            fields.get("asks_again") is True,
            tuple(receipt for receipt in receipts if receipt is not None),
            _seconds_in(fields.get("seconds")),
            fields.get("published") is True,
        )

    @classmethod
    def joint(cls, reports: list[WorkerReport]) -> WorkerReport:
        """Say once what several say alike, add up bytes, tell each phase of the slowest; all ask again if one does."""
        transports = dict.fromkeys(report.transport for report in reports if report.transport)
        warnings = dict.fromkeys(warning for report in reports for warning in report.warnings)
        moved = map(sum, zip_longest(*(report.moved for report in reports), fillvalue=0))
        kept, again = sum(report.kept for report in reports), any(report.asks_again for report in reports)
        receipts = tuple(receipt for report in reports for receipt in report.receipts)
        told = {phase: [own.seconds[phase] for own in reports if phase in own.seconds] for phase in PHASES}
        seconds = {phase: max(several) for phase, several in told.items() if several}
        return cls(", ".join(transports), tuple(warnings), kept, tuple(moved), again, receipts, seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        counts = {"kept": self.kept, "moved": list(self.moved)} if self.moved else {}
        again = {"asks_again": True} if self.asks_again else {}
        receipts = {"receipts": [receipt.to_dict() for receipt in self.receipts]} if self.receipts else {}
        seconds = {"seconds": dict(self.seconds)} if self.seconds else {}
        return {"transport": self.transport, "warnings": list(self.warnings), **counts, **again, **receipts, **seconds}


def _seconds_in(said: object) -> dict[str, float]:
    told = [(phase, said[phase]) for phase in PHASES if phase in said] if isinstance(said, dict) else []
    return {phase: float(value) for phase, value in told if _is_number(value) and 0 <= value < math.inf}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
        kept: bytes that went by region to the workers behind each address: what they keep, and no more.
        given: bytes that each trainer rank gave by region, to all workers together.
        gathered: bytes of the weights that lie on several trainer ranks and were gathered, to go whole.
        gathered_because: why they were, in words.
        receipts: what each of the workers behind an address has received, as far as they tell.
        worker_seconds: by address, the workers' wall time by phase until they have everything, as far as they tell; see
            `PHASES`.
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
    kept: dict[str, int] = attrs.field(factory=dict)
    given: tuple[int, ...] = ()
    gathered: int = 0
    gathered_because: str = ""
    receipts: dict[str, tuple[Receipt, ...]] = attrs.field(factory=dict)
    worker_seconds: dict[str, dict[str, float]] = attrs.field(factory=dict)

    @property
    def imbalance(self) -> float:
        """What the busiest trainer rank gave by region, over the mean of all; 1.0 if all gave alike, or none gave."""
        return max(self.given) * len(self.given) / sum(self.given) if sum(self.given) else 1.0

    @property
    def total_seconds(self) -> float:
        """Wall time of all phases."""
        return sum(self.seconds.values())

    @property
    def gbps(self) -> float:
        """GB/s (10**9 bytes) at which a copy of what was sent came to the workers: ``nbytes`` over the update phase."""
        return self.nbytes / self.seconds["update"] / 1e9 if self.seconds.get("update") else 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in self.seconds.items())
        lost = f", lost {', '.join(peer for peer, _ in self.lost)}" if self.lost else ""
        over = ", ".join(dict.fromkeys(self.transports.values()))
        warnings = "".join(f"; warning: {warning}" for warning in self.warnings)
        kept = f", {sized(sum(self.kept.values()))} by region" if self.kept else ""
        gathered = f", {sized(self.gathered)} gathered: {self.gathered_because}" if self.gathered else ""
        return (
            f"version {self.version}: {sized(self.nbytes)} to {counted(len(self.workers))} over {self.backend}"
            f"{f', {over},' if over else ''} at {sized(self.gbps * 1e9)}/s ({phases}){kept}{gathered}{lost}{warnings}"
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
