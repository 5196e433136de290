"""The updates of a run as one HTML page, which needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Self

import attrs
from markupsafe import Markup

from weight_transfer.pages.phases import in_order
from weight_transfer.pages.rendering import fragment, render
from weight_transfer.pages.tracks import Span

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_NAMED = 8  # workers of an update
_TEXT = 600  # characters of a name or an error
_UNTOLD = "not told by phase"


@attrs.define(eq=False, kw_only=True)
class ShownUpdate:
    """An update as the page shows it: what may be long is cut, of many workers there are some.

    Attributes:
        start: seconds from the beginning of the run.
        rate: bytes per second; None if it failed.
        spans: of its phases: name, begin and length.
        worker_spans: those of its workers, by their addresses.
        count: of the workers that serve it.
    """

    role: str
    backend: str
    version: str | None
    target: str
    start: float
    seconds: float
    phases: dict[str, float]
    spans: list[Span]
    worker_spans: list[tuple[str, list[Span]]]
    nbytes: int
    rate: float | None
    link_fraction: float | None
    count: int
    workers: list[str]
    lost: list[tuple[str, str]]
    lost_count: int
    error: str | None
    error_type: str
    _row: Markup | None = None

    @property
    def row(self) -> Markup:
        """What shows it in a page; it is made once."""
        if self._row is None:
            self._row = fragment("update_row.html", "row", self)
        return self._row

    @property
    def joining(self) -> float:
        """Seconds of the phase ``init``: few updates have much of it, which would dwarf the others."""
        return self.phases.get("init", 0.0)

    @property
    def joined_spans(self) -> list[Span]:
        """Those of its phases from when the workers have joined."""
        return [(phase, begin - self.joining, seconds) for phase, begin, seconds in self.spans if phase != "init"]

    @property
    def all_spans(self) -> list[list[Span]]:
        """Those of its own phases and of its workers'."""
        return [self.spans, *(spans for _, spans in self.worker_spans)]

    @classmethod
    def of(cls, event: TransferFinished, start: float) -> Self:
        """Return what is shown of an update that began ``start`` seconds into the run."""
        of_workers = list(event.worker_phases.items())[:_NAMED]
        begin = sum(event.phases.get(phase, 0.0) for phase in ("init", "start", "plan"))  # then workers are told
        good = event.error is None
        return cls(
            role=event.role,
            backend=event.backend[:_TEXT],
            version=None if event.version is None else str(event.version)[:_TEXT],
            target=event.target[:_TEXT],
            start=start,
            seconds=event.seconds,
            phases=dict(event.phases),
            spans=_in_turn(event.phases or {_UNTOLD: event.seconds}, 0.0),
            worker_spans=[
                (address[:_TEXT], _in_turn(phases, begin - phases.get("start", 0.0))) for address, phases in of_workers
            ],
            nbytes=event.nbytes,
            rate=event.bytes_per_second if good else None,
            link_fraction=event.link_fraction if good else None,
            count=len(event.workers),
            workers=[address[:_TEXT] for address in event.workers[:_NAMED]],
            lost=[(address[:_TEXT], error[:_TEXT]) for address, error in event.lost[:_NAMED]],
            lost_count=len(event.lost),
            error=None if event.error is None else event.error[:_TEXT],
            error_type=event.error_type[:_TEXT],
        )


def _in_turn(phases: Mapping[str, float], begin: float) -> list[Span]:
    """Return phases one after another."""
    spans, at = [], begin
    for phase, seconds in phases.items():
        spans.append((phase, at, seconds))
        at += seconds
    return spans


def page(kept: Sequence[ShownUpdate], total: int, began: str) -> str:
    """Return the page of a run.

    Args:
        kept: updates, in the order of their ends; one at least.
        total: how many there were.
        began: when the first one began.
    """
    trains = any(update.role == "trainer" for update in kept)
    sent = [update for update in kept if update.role == "trainer" or not trains]
    good = [update for update in sent if update.error is None]
    first = min(update.start for update in kept)
    return render(
        "updates.html",
        title="Weight transfer: updates",
        began=began,
        dropped=total - len(kept),
        rows=[update.row for update in kept],
        sent=sent,
        good=good,
        median=median(update.seconds for update in good) if good else None,
        best=max((update.rate for update in good if update.rate is not None), default=None),
        span=max(update.start + update.seconds for update in kept) - first,
        marks=[
            (update.start - first, update.seconds, update.error is None, f"{update.role}, version {update.version}")
            for update in kept
        ],
        longest=max(update.seconds - update.joining for update in kept),
        phases=in_order({phase for update in kept for spans in update.all_spans for phase, _, _ in spans}),
    )
