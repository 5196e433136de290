"""Writes the updates of a run into an HTML page that needs nothing else."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.observers.update_page import ShownUpdate, page
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_KEPT = 500  # updates
_PAUSE = 0.5  # seconds between two times that it is written, at least
_SPARE = 50  # times as long as it takes to write it


class UpdateReport:
    """A page with the last 500 updates; an observer, such as ``WeightSender(..., observers=(UpdateReport(path),))``.

    A thread of its own writes it as a whole, so that who opens it never sees half of one: within half a second of an
    update, or a little later once it is large, and when the process ends. Long names and errors are cut, and of many
    workers some are named, so that its size is bounded. If it cannot be written, the next update's hook raises the
    `OSError`.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._kept: deque[ShownUpdate] = deque(maxlen=_KEPT)
        self._count = 0
        self._began = time.monotonic()
        self._clock = datetime.now(UTC).isoformat(timespec="seconds")
        self._error: OSError | None = None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._told = threading.Event()
        threading.Thread(target=self._keep_writing, name="weight-transfer-report", daemon=True).start()
        atexit.register(self.flush)

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        ended = time.monotonic()
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._count:
                self._began = ended - event.seconds
                self._clock = datetime.now(UTC).isoformat(timespec="seconds")
            self._kept.append(ShownUpdate.of(event, ended - event.seconds - self._began))
            self._count += 1
        self._told.set()

    def flush(self) -> None:
        """Write what was told and is not yet written.

        Raises:
            OSError: it cannot be written.
        """
        with self._writing:
            if self._told.is_set():
                self._told.clear()
                self._write()

    def _keep_writing(self) -> None:
        while self._error is None:
            self._told.wait()
            since = time.monotonic()
            try:
                self.flush()
            except OSError as error:
                self._error = error
            time.sleep(max(_PAUSE, _SPARE * (time.monotonic() - since)))

    def _write(self) -> None:
        with self._lock:
            total, kept = self._count, list(self._kept)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_text(page(kept, total, self._clock), encoding="utf-8")
        draft.replace(self._path)
