"""What a trainer's update tells of itself: bytes as events, and seconds by phase."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from weight_transfer.values.events import TransferProgress

if TYPE_CHECKING:
    from weight_transfer.model.info import WeightTransferUpdateInfo

_INTERVAL = 0.1  # seconds


class Progress:
    """Turns an engine's byte counts into events, a few a second."""

    def __init__(self, notify: Any, info: WeightTransferUpdateInfo, backend: str) -> None:
        self._notify = notify
        self._info = info
        self._backend = backend
        self._done = 0
        self._told = 0.0

    @property
    def left(self) -> int:
        """Bytes that nobody has reported: those that the workers pulled."""
        return self._info.manifest.nbytes - self._done

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        total, now = self._info.manifest.nbytes, time.monotonic()
        if now - self._told >= _INTERVAL or self._done == total:
            self._told = now
            event = TransferProgress(
                role="trainer", backend=self._backend, version=self._info.version, done=self._done, total=total
            )
            self._notify("weight_transfer_progress", event)


class Laps:
    """How long one thing after another took.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, phase: str) -> None:
        """A phase is over, and the next one begins."""
        since, self._since = self._since, time.perf_counter()
        self.seconds[phase] = self._since - since
