"""The observer ``progress``: a bar on stderr for an update that takes over half a second, and a line when it is done.

Without a terminal there is the line alone. Several receivers of one process share one bar.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from weight_transfer.plugins.hookspecs import hookimpl
from weight_transfer.values.events import TransferStarted
from weight_transfer.values.report import sized

if TYPE_CHECKING:
    from weight_transfer.values.events import TransferFinished, TransferProgress

_PATIENCE = 0.5  # seconds


@attrs.define
class _Update:
    """The running updates of one role; ``task`` is their bar, once it is shown."""

    started: TransferStarted
    timer: threading.Timer
    running: int = 1
    done: int = 0
    shown: bool = False
    task: TaskID | None = None


class ProgressReporter:
    """Shows updates; its three methods may be called from any thread.

    Args:
        console: where; default is stderr.
        patience: seconds that an update may take unseen.
    """

    def __init__(self, console: Console | None = None, patience: float = _PATIENCE) -> None:
        self._given = console
        self._patience = patience
        self._lock = threading.Lock()
        self._updates: dict[str, _Update] = {}
        self._bars: Progress | None = None

    def started(self, event: TransferStarted) -> None:
        with self._lock:
            update = self._updates.get(event.role)
            if update is not None:
                update.running += 1
                return
            timer = threading.Timer(self._patience, self._show, (event,))
            timer.daemon = True
            self._updates[event.role] = _Update(event, timer)
            timer.start()

    def progress(self, event: TransferProgress) -> None:
        with self._lock:
            update = self._updates.get(event.role)
            if update is None:
                return
            update.done = event.done
            if update.task is not None and self._bars is not None:
                self._bars.update(update.task, completed=event.done)

    def finished(self, event: TransferFinished) -> None:
        with self._lock:
            update = self._updates.get(event.role)
            if update is None:
                return
            update.running -= 1
            if update.running:
                return
            del self._updates[event.role]
            update.timer.cancel()
            if update.shown:
                self._take_down(update)
                self._console().print(_summary(event), soft_wrap=True, highlight=False, markup=False)

    def _show(self, event: TransferStarted) -> None:
        with self._lock:
            update = self._updates.get(event.role)
            if update is None or update.started is not event:
                return
            update.shown = True
            if not self._console().is_terminal:
                return
            if self._bars is None:
                columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
                description = TextColumn("{task.description}")
                self._bars = Progress(description, *columns, console=self._console(), transient=True)
                self._bars.start()
            update.task = self._bars.add_task(_title(event), total=event.nbytes, completed=update.done)

    def _take_down(self, update: _Update) -> None:
        if self._bars is None or update.task is None:
            return
        self._bars.remove_task(update.task)
        if not self._bars.tasks:
            self._bars.stop()
            self._bars = None

    def _console(self) -> Console:
        return self._given or Console(stderr=True)


def _title(event: TransferStarted | TransferFinished) -> str:
    version = "" if event.version is None else f" {event.version}"
    return f"{event.role}: version{version} over {event.backend}"


def _summary(event: TransferFinished) -> str:
    if event.error is not None:
        return f"{_title(event)} failed after {event.seconds:.1f} s: {event.error}"
    speed = event.nbytes / event.seconds if event.seconds else 0.0
    return f"{_title(event)}: {sized(event.nbytes)} in {event.seconds:.1f} s, {sized(speed)}/s"


_reporter = ProgressReporter()


@hookimpl
def weight_transfer_started(event: TransferStarted) -> None:
    """See `ProgressReporter.started`."""
    _reporter.started(event)


@hookimpl
def weight_transfer_progress(event: TransferProgress) -> None:
    """See `ProgressReporter.progress`."""
    _reporter.progress(event)


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """See `ProgressReporter.finished`."""
    _reporter.finished(event)
