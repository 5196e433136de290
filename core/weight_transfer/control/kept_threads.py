"""Threads for calls that block: as many as there are calls at once, kept for the next ones."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_IDLE = 10.0  # seconds after which a thread that has nothing to do ends


class KeptThreads:
    """Runs each call at once, on a daemon thread that has nothing to do or on a new one.

    A call that never returns costs its thread, and nobody waits for it when the process ends.

    Args:
        name: of the threads; kept as an attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], object]]] = []
        os.register_at_fork(after_in_child=self._forget)

    def run(self, call: Callable[[], object]) -> None:
        """Have ``call`` run, which deals with its own failures; return at once."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name=self.name, daemon=True).start()
        inbox.put(call)

    def _work(self, inbox: queue.SimpleQueue[Callable[[], object]]) -> None:
        while True:
            try:
                call = inbox.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:
                    if inbox in self._idle:  # else a call is on its way
                        self._idle.remove(inbox)
                        return
                continue
            try:
                call()
            except BaseException:
                logger.exception("a call on thread %s has failed", self.name)
            del call  # nothing that it refers to outlives it
            with self._lock:
                self._idle.append(inbox)

    def _forget(self) -> None:
        self._lock, self._idle = threading.Lock(), []
