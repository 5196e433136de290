"""One moment by which something must be over; every blocking call takes one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from weight_transfer.errors import TransferTimeoutError

LONG = 2.0
"""Seconds after which a wait is logged, with whom it waits for."""

_AWAKE = 0.2  # seconds that a wait does not sleep: of a virtual machine the shortest sleep takes 0.1 ms
_NAP = 1e-4  # seconds that it sleeps at a time then


class Deadline:
    """A point in time, ``seconds`` from its creation, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._end

    def check(self, what: str, **fields: str | None) -> None:
        """Raise `TransferTimeoutError` if the deadline has passed.

        Args:
            what: what was being waited for or done, as in "waiting for worker 2".
            fields: ``backend``, ``phase`` and ``peer`` of the error.
        """
        if self.expired:
            raise self.timeout(what, **fields)

    def wait_for(self, predicate: Callable[[], object], what: str, **fields: str | None) -> None:
        """Wait on this thread until ``predicate()`` is true, such as a CUDA event's ``query``.

        It is asked again and again: for the first 0.2 s without a sleep, though others may have the processor, and then
        every 0.1 ms. What it raises ends the wait.

        Args:
            predicate: tells whether the wait is over.
            what: as `check` takes it.
            fields: the same.

        Raises:
            TransferTimeoutError: the deadline passed.
        """
        awake = time.monotonic() + _AWAKE
        while not predicate():
            self.check(what, **fields)
            if time.monotonic() < awake:
                os.sched_yield()
            else:
                time.sleep(_NAP)

    def timeout(self, what: str, **fields: str | None) -> TransferTimeoutError:
        """Return the error that says that this deadline passed while ``what``."""
        return TransferTimeoutError(f"The deadline of {round(self.seconds, 3):g} s passed while {what}.", **fields)
