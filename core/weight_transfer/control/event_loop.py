"""The thread on which a trainer's HTTP channels wait for their workers: one, however many they are."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import ClassVar

_END = 5.0  # seconds that the thread has to end in


class EventLoop:
    """An asyncio loop that runs on a daemon thread of its own, until nobody uses it any more."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _running: ClassVar[dict[int, EventLoop]] = {}

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._users = 0
        self._thread = threading.Thread(target=self._run, name="weight-transfer channels", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(asyncio.sleep(0))  # what was closed needs a turn
        finally:
            self.loop.close()

    @classmethod
    def shared(cls) -> EventLoop:
        """Return the one of this process, and have it run until all have released it that have called this."""
        with cls._lock:
            found = cls._running.get(os.getpid())  # a fork takes no threads along
            if found is None:
                found = cls._running[os.getpid()] = cls()
            found._users += 1
            return found

    def release(self) -> None:
        """Let go of it."""
        with self._lock:
            self._users -= 1
            if self._users or self._running.get(os.getpid()) is not self:
                return
            del self._running[os.getpid()]
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_END)
