"""What fails in a process of its surroundings: its files cannot grow, or the clock on the wall jumps."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

_SMALL = 4096  # bytes


class Outages:
    """Those of this process, each until it is told otherwise."""

    def __init__(self) -> None:
        self._time, self._time_ns = time.time, time.time_ns  # noqa: TID251  (to be replaced)

    def limit_files(self, limited: bool) -> None:
        """Let no file grow beyond a page, as on a disk that is full, or in a ``/dev/shm`` that is; memfds are files."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL if limited else most, most))

    def shift_clock(self, seconds: float) -> None:
        """Have Python's wall clock jump by that many seconds from the true time; deadlines are none of its business."""
        time.time = lambda: self._time() + seconds  # noqa: TID251
        time.time_ns = lambda: self._time_ns() + int(seconds * 1e9)

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands of an actor; ``name`` is that of a session, which does not matter."""
        return {
            "limit_files": lambda name, limited: self.limit_files(limited),
            "shift_clock": lambda name, seconds: self.shift_clock(seconds),
        }
