"""What there is to see, and the view that prints it as lines."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

import attrs
import click

from weight_transfer.values.events import Version
from weight_transfer.values.report import counted

if TYPE_CHECKING:
    from weight_transfer.demo.proof import Verdict
    from weight_transfer.values.report import TransferReport


@attrs.frozen(kw_only=True)
class Facts:
    """What stays the same throughout a run; ``workers`` are pairs of name and place."""

    backend: str
    provider: str
    parameters: int
    steps: int
    workers: tuple[tuple[str, str], ...]


@attrs.frozen(kw_only=True)
class Sample:
    """What a worker generates with one version of the weights."""

    worker: str
    version: Version
    state: str
    prompt: str
    text: str


class View(Protocol):
    """Shows a run, from `phase` to `proved`. Samples come from other threads."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def phase(self, what: str) -> None:
        """Say what is going on while nothing else moves."""

    def begin(self, facts: Facts) -> None:
        """All are up."""

    def stepped(self, step: int, loss: float) -> None:
        """A training step is done."""

    def sending(self, version: Version) -> None:
        """An update begins."""

    def updated(self, report: TransferReport, loss: float | None) -> None:
        """An update is done; ``loss`` is None before the first step."""

    def sampled(self, sample: Sample) -> None:
        """A worker has generated."""

    def proved(self, verdicts: Sequence[Verdict]) -> None:
        """The end."""


class PlainView:
    """Prints a line for each thing that happens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, what: str) -> None:
        self._print(f"{what} ...")

    def begin(self, facts: Facts) -> None:
        self._steps = facts.steps
        self._print(f"backend {facts.backend}: {facts.provider}")
        self._print(f"model: Llama architecture, {facts.parameters:,} parameters, float32")
        for name, where in facts.workers:
            self._print(f"{name}: {where}")

    def stepped(self, step: int, loss: float) -> None:
        """A step is no line of its own; `updated` tells the last one's loss."""

    def sending(self, version: Version) -> None:
        """No line either."""

    def updated(self, report: TransferReport, loss: float | None) -> None:
        told = "" if loss is None else f", loss {loss:.3f}"
        control = ", ".join(f"{phase} {seconds * 1e3:.1f}" for phase, seconds in report.seconds.items())
        self._print(
            f"step {report.version}/{self._steps}{told}: version {report.version} to {counted(len(report.workers))} "
            f"in {report.total_seconds * 1e3:.1f} ms ({control}), {report.gbps:.2f} GB/s"
        )

    def sampled(self, sample: Sample) -> None:
        text = (sample.prompt + sample.text).replace("\n", " / ")
        self._print(f"  {sample.worker}: {sample.state}, version {sample.version}: {text}")

    def proved(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self._print(str(verdict))

    def _print(self, line: str) -> None:
        with self._lock:
            click.echo(line)
