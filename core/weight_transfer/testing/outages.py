"""What fails in a process of its surroundings: files, memory, the network, or the clock on the wall."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from weight_transfer.testing.lost_packets import silence
from weight_transfer.testing.resources import give_back_freed, memory_of

_SMALL = 4096  # bytes
_LEFT = 20 * 2**20  # bytes of memory that can be had still: for stacks of threads, and what is small
_STACK = 512 * 2**10  # bytes of a thread's stack meanwhile; 8 MiB by default


class Outages:
    """Those of this process, each until it is told otherwise."""

    def __init__(self) -> None:
        self._time, self._time_ns = time.time, time.time_ns  # noqa: TID251  (to be replaced)

    def limit_files(self, limited: bool) -> None:
        """Let no file grow beyond a page, as on a disk that is full, or in a ``/dev/shm`` that is; memfds are files."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL if limited else most, most))

    def limit_memory(self, limited: bool) -> None:
        """Let this process map little more memory than it has now, private or shared."""
        give_back_freed()
        held = {resource.RLIMIT_AS: memory_of("VmSize"), resource.RLIMIT_DATA: memory_of("VmData")}
        for limit, nbytes in held.items():  # the first counts shared memory, too, the second what malloc has reserved
            _, most = resource.getrlimit(limit)
            resource.setrlimit(limit, (nbytes + _LEFT if limited else most, most))
        threading.stack_size(_STACK if limited else 0)

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """Limit memory inside a ``with`` block."""
        self.limit_memory(True)
        try:
            yield
        finally:
            self.limit_memory(False)

    def shift_clock(self, seconds: float) -> None:
        """Have Python's wall clock jump by that many seconds from the true time; deadlines are none of its business."""
        time.time = lambda: self._time() + seconds  # noqa: TID251
        time.time_ns = lambda: self._time_ns() + int(seconds * 1e9)

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands of an actor; ``name`` is that of a session, which does not matter."""
        return {
            "limit_files": lambda name, limited: self.limit_files(limited),
            "limit_memory": lambda name, limited: self.limit_memory(limited),
            "silence": lambda name, silent, but: silence(silent, but),
            "shift_clock": lambda name, seconds: self.shift_clock(seconds),
        }
