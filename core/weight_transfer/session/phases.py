"""Where the time of one side's update goes."""

from __future__ import annotations

import time

from weight_transfer.values.events import PHASES


class Phases:
    """Seconds of wall time by phase. What is inside another phase is taken out of that one, so that they add up.

    One thread at a time enters phases. On a GPU they end when their work is queued.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._entered: set[str] = set()
        self._present: str | None = None
        self._since = 0.0

    def within(self, phase: str) -> Within:
        """Be in a phase for the length of a ``with`` block."""
        return Within(self, phase)

    def enter(self, phase: str | None) -> str | None:
        """Leave the present phase for another one, or for none; return the one that is left."""
        now, left = time.perf_counter(), self._present
        if left is not None:
            self._seconds[left] += now - self._since
        if phase is not None:
            self._entered.add(phase)
        self._present, self._since = phase, now
        return left

    def move(self, seconds: float, source: str, to: str) -> None:
        """Count up to so many seconds for another phase than that in which they have passed, which is over."""
        moved = min(seconds, self._seconds[source])
        self._entered.add(to)
        self._seconds[source] -= moved
        self._seconds[to] += moved

    def told(self) -> dict[str, float]:
        """Return the seconds of each phase that was entered, in the order of `PHASES`; the present one is left."""
        self.enter(None)
        return {phase: seconds for phase, seconds in self._seconds.items() if phase in self._entered}


class Within:
    """A ``with`` block in which one is in a phase; a generator would take three times as long."""

    __slots__ = ("_outer", "_phase", "_phases")

    def __init__(self, phases: Phases, phase: str) -> None:
        self._phases = phases
        self._phase = phase
        self._outer: str | None = None

    def __enter__(self) -> None:
        self._outer = self._phases.enter(self._phase)

    def __exit__(self, *error: object) -> None:
        self._phases.enter(self._outer)
