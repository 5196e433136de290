"""One moment by which something must be over; every blocking call takes one."""

from __future__ import annotations

import time

from weight_transfer.errors import TransferTimeoutError

LONG = 2.0
"""Seconds after which a wait is logged, with whom it waits for."""


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

    def timeout(self, what: str, **fields: str | None) -> TransferTimeoutError:
        """Return the error that says that this deadline passed while ``what``."""
        return TransferTimeoutError(f"The deadline of {round(self.seconds, 3):g} s passed while {what}.", **fields)
