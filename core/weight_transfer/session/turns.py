"""Turns at a control channel: calls that never overlap, though one may outlive its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_transfer.errors import TransferError, TransferTimeoutError

if TYPE_CHECKING:
    from weight_transfer.values.deadline import Deadline


class Turns:
    """Lets the calls to one channel through, one after another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: str | None = None
        self._since = 0.0
        self._withdrawn = 0

    def ticket(self) -> int:
        """Return what a call needs to take its turn; it is void once the calls that wait are withdrawn."""
        return self._withdrawn

    @contextmanager
    def taken(self, method: str, ticket: int, patience: Deadline) -> Iterator[None]:
        """Wait until no other call is under way, and keep the others waiting inside of a ``with`` block.

        Args:
            method: what is to be called.
            ticket: from before.
            patience: until when to wait.

        Raises:
            TransferTimeoutError: the other call, which is named, did not end by then.
            TransferError: the ticket is void.
        """
        with self._changed:
            while self._under_way is not None and ticket == self._withdrawn:
                if patience.expired:
                    raise self._late(patience)
                self._changed.wait(patience.remaining())
            if ticket != self._withdrawn:
                raise TransferError(f"{method} was not called: the update had been given up by then.")
            self._under_way, self._since = method, time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._under_way = None
                self._changed.notify_all()

    def withdraw(self) -> None:
        """Have no call begin that waits now, or that has a ticket."""
        with self._changed:
            self._withdrawn += 1
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._under_way is not None

    def late(self, deadline: Deadline) -> TransferTimeoutError | None:
        """Return the error that says which call is under way still; None if none is."""
        with self._changed:
            return self._late(deadline) if self._under_way is not None else None

    def _late(self, deadline: Deadline) -> TransferTimeoutError:
        seconds = time.monotonic() - self._since
        what = f"waiting for the worker's {self._under_way} to end, which is still under way after {seconds:.1f} s"
        return deadline.timeout(what)
