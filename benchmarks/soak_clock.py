"""Seconds in which this process could run: not those in which it was stopped, or waited for a processor."""

from __future__ import annotations

import threading
import time

_TICK = 0.05  # seconds


class Clock(threading.Thread):
    """Counts them, on a daemon thread that looks at the time again and again."""

    def __init__(self) -> None:
        super().__init__(name="soak clock", daemon=True)
        self._lock = threading.Lock()
        self._latest = time.monotonic()
        self._lost = 0.0
        self.start()

    def run(self) -> None:
        while True:
            time.sleep(_TICK)
            self.now()

    def now(self) -> float:
        """Return a moment in these seconds."""
        with self._lock:
            before, self._latest = self._latest, time.monotonic()
            self._lost += max(self._latest - before - 2 * _TICK, 0.0)
            return self._latest - self._lost
