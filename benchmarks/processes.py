"""Which processes there are, and what this one holds, from ``/proc``."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.testing.resources import held, threads

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Actor

_STOPPING = 10.0  # seconds


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, Path(thread, "children").read_text().split())
    return found


def runs(pid: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    with suppress(OSError):
        return _state(Path(f"/proc/{pid}")) != "Z"
    return False


def signal_to(actor: Actor, number: int) -> None:
    """Send a signal to an actor, unless it has ended."""
    with suppress(ProcessLookupError):
        os.kill(actor.pid, number)


def stop(pid: int) -> None:
    """Have a process stand still, and wait until all of its threads do."""
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + _STOPPING
    while any(_state(task) not in "TtZ" for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > until:
            raise AssertionError(f"process {pid} does not stop")
        time.sleep(0.001)


def _state(process: Path) -> str:
    return Path(process, "stat").read_text().rpartition(")")[2].split()[0]


def everything_held() -> dict[str, int]:
    """Return what `held` counts of this process, and all threads: those kept for the next call end after a while."""
    return held() | {"threads of any kind": len(threads()), "abandoned files in /dev/shm": 0}
