"""What calls have answered, for the one thread that waits for it.

While it waits for few workers it reads their connections itself: else the thread of the channels would be woken for
each answer, and would wake it in its turn.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from weight_transfer.values.deadline import Deadline

T = TypeVar("T")

_SLEEPLESS = 1e-3  # seconds


class Wire(Protocol):
    """A connection that whoever waits may read."""

    def fileno(self) -> int:
        """Return the descriptor; -1 once it is closed."""

    def read(self) -> None:
        """Take what has come; for answers, that puts them into the inbox."""

    def read_alone(self, alone: bool) -> None:
        """Have nobody else read from now on, or again."""


class Bell:
    """Wakes a thread that waits for descriptors. It is closed when nobody has it any more, or by `close`."""

    def __init__(self) -> None:
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self.close = weakref.finalize(self, _close, self._ear, self._mouth)

    def fileno(self) -> int:
        """Return the descriptor that can be read once it was rung."""
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake whoever waits; from any thread."""
        with suppress(OSError):  # it has been rung often enough, or nobody waits any more
            self._mouth.send(b"!")

    def read(self) -> None:
        """Be silent again."""
        with suppress(BlockingIOError):
            self._ear.recv(4096)


class Inbox(Generic[T]):
    """Takes in what has happened, from any thread.

    Args:
        bell: for the thread that waits.
    """

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._reader: int | None = None

    def put(self, item: T) -> None:
        """Add one."""
        self._items.put(item)
        if self._reader not in (None, threading.get_ident()):
            self._bell.ring()

    def get(self, timeout: float, wires: Sequence[Wire] = (), eager: bool = False) -> T:
        """Return the next one.

        Args:
            timeout: seconds to wait.
            wires: those that may bring one, and are read meanwhile.
            eager: whether one is to come at once, sooner than a thread that sleeps is woken.

        Raises:
            queue.Empty: there was none.
        """
        if not wires:
            return self._items.get(timeout=timeout)
        deadline = Deadline(timeout)
        by_number: dict[int, Bell | Wire] = {wire.fileno(): wire for wire in wires}
        by_number[self._bell.fileno()] = self._bell
        ready = select.poll()
        for number in by_number.keys() - {-1}:
            ready.register(number, select.POLLIN)
        self._reader = threading.get_ident()
        sleepless = Deadline(min(_SLEEPLESS, timeout) if eager else 0.0)
        try:
            for wire in wires:
                wire.read_alone(True)
            while self._items.empty() and not deadline.expired:
                found = ready.poll(0)
                if not found and not sleepless.expired:
                    os.sched_yield()
                    continue
                for number, _ in found or ready.poll(1000 * deadline.remaining()):
                    by_number[number].read()
            return self._items.get_nowait()
        finally:
            self._reader = None
            for wire in wires:
                wire.read_alone(False)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        each.close()
