"""The live view: training, updates, and what each worker says, drawn anew a few times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from weight_transfer.demo.proof import Verdict
    from weight_transfer.demo.view import Facts, Sample
    from weight_transfer.values.events import Version
    from weight_transfer.values.report import TransferReport

_PHASES = ("init", "start", "update", "finish")
_PANEL_HEIGHT = 5  # lines, of which three are text
_OTHER_LINES = 9  # of the screen: everything but panels and rows of the table
_OTHER_COLUMNS = 55  # of the line of the training: everything but its bar
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 16  # bars in the picture of the loss


class LiveView:
    """Draws a run on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._lock = threading.Lock()
        self._spinner: Spinner | None = None
        self._facts: Facts | None = None
        self._losses: list[float] = []
        self._since = 0.0
        self._trained = 0.0
        self._updates: list[tuple[TransferReport, float | None]] = []
        self._samples: dict[str, Sample] = {}
        self._sending: Version | None = None
        self._ended = False
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._spinner, self._ended = None, True
        self._live.stop()

    def phase(self, what: str) -> None:
        with self._lock:
            self._spinner = Spinner("dots", Text(what), style="cyan")

    def begin(self, facts: Facts) -> None:
        with self._lock:
            self._facts, self._spinner = facts, None
            self._since = time.monotonic()

    def stepped(self, step: int, loss: float) -> None:
        with self._lock:
            self._losses.append(loss)
            self._trained = time.monotonic() - self._since

    def sending(self, version: Version) -> None:
        with self._lock:
            self._sending = version

    def updated(self, report: TransferReport, loss: float | None) -> None:
        with self._lock:
            self._updates.append((report, loss))
            self._sending = None

    def sampled(self, sample: Sample) -> None:
        with self._lock:
            self._samples[sample.worker] = sample

    def proved(self, verdicts: Sequence[Verdict]) -> None:
        self.__exit__()
        for verdict in verdicts:
            self._console.print(Text(str(verdict), style="green" if verdict.holds else "bold red"))

    def _render(self) -> RenderableType:
        with self._lock:
            return Group(*self._parts())

    def _parts(self) -> Iterator[RenderableType]:
        facts = self._facts
        if facts is not None:
            size = f"{facts.parameters / 1e6:.1f} M parameters"
            yield Text.assemble(("weight-transfer demo", "bold"), (f"  Llama, {size}, float32", "dim"))
            yield Text.assemble(("backend ", "dim"), (facts.backend, "bold cyan"), (f"  {facts.provider}", "dim"))
            yield Text()
            yield self._training(facts)
            yield Text()
            yield self._table(facts)
            for name, where in facts.workers:
                yield self._panel(name, where)
        if self._spinner is not None:
            yield self._spinner

    def _training(self, facts: Facts) -> RenderableType:
        done = len(self._losses)
        line = Table.grid(padding=(0, 1))
        width = max(4, min(20, self._console.width - _OTHER_COLUMNS))
        bar = ProgressBar(total=facts.steps, completed=done, width=width, complete_style="cyan", finished_style="cyan")
        cells: list[RenderableType] = [Text("step", "dim"), bar, f"{done}/{facts.steps}"]
        if self._losses:
            cells += [Text("loss", "dim"), f"{self._losses[-1]:.3f}", Text(_sparks(self._losses), "cyan")]
            cells += [Text(f"{done / max(self._trained, 1e-9):.1f} steps/s", "dim")]
        line.add_row(*cells)
        return line

    def _table(self, facts: Facts) -> RenderableType:
        table = Table(box=None, padding=(0, 1 if self._console.width < 70 else 2, 0, 0), header_style="dim")
        for name in ("version", "loss", "GB/s", "ms", "=", *_PHASES):
            table.add_column("" if name == "=" else name, justify="right", style="dim" if name in _PHASES else "")
        room = self._console.height - _OTHER_LINES - _PANEL_HEIGHT * len(facts.workers)
        shown = self._updates if self._ended else self._updates[-max(2, room) :]
        for report, loss in shown:
            phases = [f"{report.seconds.get(phase, 0.0) * 1e3:.1f}" for phase in _PHASES]
            told = "" if loss is None else f"{loss:.3f}"
            total = f"{report.total_seconds * 1e3:.1f}"
            table.add_row(Text(str(report.version), "bold"), told, f"{report.gbps:.2f}", total, "=", *phases)
        return table

    def _panel(self, name: str, where: str) -> RenderableType:
        sample = self._samples.get(name)
        state = "updating" if self._sending is not None else sample.state if sample else "created"
        version = "no version" if sample is None else f"version {sample.version}"
        text = Text.assemble((sample.prompt, "dim"), (sample.text, "bold")) if sample else Text("random weights", "dim")
        return Panel(
            text,
            title=Text.assemble((name, "bold"), (f" · {where}", "dim")),
            title_align="left",
            subtitle=Text.assemble((version, "bold"), " · ", (state, "green" if state == "ready" else "yellow")),
            subtitle_align="right",
            border_style="cyan",
            height=_PANEL_HEIGHT,
        )


def _sparks(losses: Sequence[float]) -> str:
    """Return the course of the loss as a row of bars; zero is the floor."""
    count = min(len(losses), _SPARKS)
    picked = [losses[(index + 1) * len(losses) // count - 1] for index in range(count)]
    return "".join(_BARS[min(len(_BARS) - 1, int(loss / max(losses) * len(_BARS)))] for loss in picked)
