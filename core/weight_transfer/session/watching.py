"""Looks now and then at what takes long, on one thread for all that is watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watcher:
    """Has a thread while there is something to watch, and for one interval more: a block that is brief costs none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: dict[object, Callable[[], None]] = {}
        self._runs = False

    @contextmanager
    def watching(self, look: Callable[[], None], interval: float) -> Iterator[None]:
        """Call ``look`` every ``interval`` seconds inside a ``with`` block, from another thread; never after it."""
        key = object()
        with self._lock:
            self._looks[key] = look
            starts, self._runs = not self._runs, True
        if starts:
            threading.Thread(target=self._run, args=(interval,), name="weight-transfer watch", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._looks[key]

    def _run(self, interval: float) -> None:
        while True:
            time.sleep(interval)
            with self._lock:
                self._runs = bool(self._looks)
                if not self._runs:
                    return
                self._look()

    def _look(self) -> None:
        """Call all; nothing of them stays in a frame afterwards."""
        for look in self._looks.values():
            look()
