"""Writes the updates of a run into an HTML page that needs nothing else."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished

_KEPT = 500  # updates
_NAMED = 8  # workers of an update
_PAUSE = 0.5  # seconds between two times that it is written
_TEXT = 600  # characters of a name or an error
_PAGE, _DATA = Path(__file__).with_name("update_report.html"), "<!-- data -->"


class UpdateReport:
    """A page with the last 500 updates; an observer, such as ``WeightSender(..., observers=(UpdateReport(path),))``.

    A thread of its own writes it as a whole, so that who opens it never sees half of one: within half a second of an
    update, and when the process ends. Long names and errors are cut, and of many workers some are named, so that its
    size is bounded. If it cannot be written, the next update's hook raises the `OSError`.

    Args:
        path: the file; its folder is made if it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._head, _, self._tail = _PAGE.read_text(encoding="utf-8").partition(_DATA)
        self._updates: deque[tuple[TransferFinished, float]] = deque(maxlen=_KEPT)
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
            self._updates.append((event, ended - event.seconds - self._began))
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
            try:
                self.flush()
            except OSError as error:
                self._error = error
            time.sleep(_PAUSE)

    def _write(self) -> None:
        with self._lock:
            total, updates = self._count, list(self._updates)
        about = {"began": self._clock, "total": total}
        data = _inline({"about": about, "updates": [_record(event, start) for event, start in updates]})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_text(self._head + data + self._tail, encoding="utf-8")
        draft.replace(self._path)


def _record(event: TransferFinished, start: float) -> dict[str, object]:
    return {
        "role": event.role,
        "backend": event.backend[:_TEXT],
        "version": None if event.version is None else str(event.version)[:_TEXT],
        "target": event.target[:_TEXT],
        "start": round(start, 6),
        "seconds": round(event.seconds, 6),
        "phases": {phase: round(seconds, 6) for phase, seconds in event.phases.items()},
        "bytes": event.nbytes,
        "rate": round(event.bytes_per_second) if event.error is None else None,
        "count": len(event.workers),
        "workers": [address[:_TEXT] for address in event.workers[:_NAMED]],
        "lost": [[address[:_TEXT], error[:_TEXT]] for address, error in event.lost[:_NAMED]],
        "error": None if event.error is None else event.error[:_TEXT],
        "kind": event.error_type,
    }


def _inline(value: object) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
