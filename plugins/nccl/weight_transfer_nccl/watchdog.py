"""Ends what blocks when its deadline passes, by a thread that is kept: starting one takes a third of a millisecond."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_LOOK = 60.0  # seconds between two looks: a deadline that comes later wakes nobody when it is set


class Watchdog:
    """Watches over one block at a time. Its thread begins with the first one, and ends with `close`.

    Args:
        end: ends what blocks, by a method of an object that this does not keep.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = weakref.WeakMethod(end)
        self._changed = threading.Condition()
        self._deadline: Deadline | None = None
        self._runs = self._closed = False

    @contextmanager
    def watching(self, deadline: Deadline) -> Iterator[None]:
        """End what blocks inside a ``with`` block when the deadline passes."""
        with self._changed:
            if not self._runs:
                threading.Thread(target=self._run, name="weight-transfer nccl watchdog", daemon=True).start()
                self._runs = True
            elif deadline.remaining() <= _LOOK:
                self._changed.notify()
            self._deadline = deadline
        try:
            yield
        finally:
            with self._changed:
                self._deadline = None

    def close(self) -> None:
        """Watch over nothing any more; callable from any thread, and twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or (self._deadline is not None and self._deadline.expired)):
                    left = self._deadline.remaining() if self._deadline is not None else _LOOK
                    self._changed.wait(min(left, _LOOK))
                if self._closed:
                    return
                self._deadline = None
            end = self._end()
            if end is not None:
                end()
