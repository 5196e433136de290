"""Turns at a control channel: calls that never overlap, though one may outlive its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_transfer.errors import TransferError
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.errors import TransferTimeoutError


class Turns:
    """Lets the calls to one channel through, one after another; aborts, too, but these wait for nobody."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: str | None = None
        self._aborts: list[Deadline] = []
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
            while self.busy and ticket == self._withdrawn:
                if patience.expired:
                    raise self._late(patience)
                self._changed.wait(min([patience.remaining(), *self._aborting()]))
            self._begin(method, ticket)
        try:
            yield
        finally:
            self.give_back()

    def take(self, method: str, ticket: int) -> bool:
        """Take the turn if no other call is under way, and return whether that was so; then `give_back` ends it.

        Raises:
            TransferError: the ticket is void.
        """
        with self._changed:
            if self.busy:
                return False
            self._begin(method, ticket)
            return True

    def give_back(self) -> None:
        """Let the next call begin."""
        with self._changed:
            self._under_way = None
            self._changed.notify_all()

    def begin_abort(self, seconds: float) -> Deadline:
        """Begin an abort, which waits for no call; calls wait for it, so many seconds at most.

        Returns:
            What `end_abort` needs.
        """
        abort = Deadline(seconds)
        with self._changed:
            if not self.busy:
                self._since = time.monotonic()
            self._aborts.append(abort)
        return abort

    def end_abort(self, abort: Deadline) -> None:
        """Let calls begin, if nothing else is under way."""
        with self._changed:
            self._aborts.remove(abort)
            self._changed.notify_all()

    def _begin(self, method: str, ticket: int) -> None:
        if ticket != self._withdrawn:
            raise TransferError(f"{method} was not called: the update had been given up by then.")
        self._under_way, self._since = method, time.monotonic()

    def withdraw(self) -> None:
        """Have no call begin that waits now, or that has a ticket."""
        with self._changed:
            self._withdrawn += 1
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._under_way is not None or bool(self._aborting())

    def late(self, deadline: Deadline) -> TransferTimeoutError | None:
        """Return the error that says which call is under way still; None if none is."""
        with self._changed:
            return self._late(deadline) if self.busy else None

    def _aborting(self) -> list[float]:
        """Return the seconds for which aborts are waited for still."""
        return [abort.remaining() for abort in self._aborts if not abort.expired]

    def _late(self, deadline: Deadline) -> TransferTimeoutError:
        seconds = time.monotonic() - self._since
        method = self._under_way or "abort_weight_update"
        what = f"waiting for the worker's {method} to end, which is still under way after {seconds:.1f} s"
        return deadline.timeout(what)
