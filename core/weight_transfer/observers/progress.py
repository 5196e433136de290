"""The observer ``progress``: a bar on stderr for an update that takes over half a second, and a line when it is done.

Without a terminal there is the line alone. Several receivers of one process share one bar.
"""

from __future__ import annotations

import os
import threading
import time
from functools import cache
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
_LOOK = 0.1  # seconds between two looks at what runs


@attrs.define
class _Update:
    """The running updates of one role; ``task`` is their bar, once it is shown."""

    started: TransferStarted
    since: float
    running: int = 1
    done: int = 0
    shown: bool = False
    task: TaskID | None = None


class ProgressReporter:
    """Shows updates; its three methods may be called from any thread.

    A thread looks now and then for updates that take long, as long as there are updates: to start one for each of them
    would take longer than the rest.

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
        self._looking = False

    def started(self, event: TransferStarted) -> None:
        with self._lock:
            update = self._updates.get(event.role)
            if update is not None:
                update.running += 1
                return
            self._updates[event.role] = _Update(event, time.monotonic())
            starts, self._looking = not self._looking, True
        if starts:
            threading.Thread(target=self._look, name="weight-transfer progress", daemon=True).start()

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
            if update.shown:
                self._take_down(update)
                self._console().print(_summary(event), soft_wrap=True, highlight=False, markup=False)

    def _look(self) -> None:
        """Show what takes long, until nothing runs."""
        while True:
            time.sleep(min(_LOOK, self._patience))
            with self._lock:
                for update in self._updates.values():
                    if not update.shown and time.monotonic() - update.since >= self._patience:
                        self._show(update)
                self._looking = bool(self._updates)
                if not self._looking:
                    return

    def _show(self, update: _Update) -> None:
        update.shown = True
        if not self._console().is_terminal:
            return
        if self._bars is None:
            columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            description = TextColumn("{task.description}")
            self._bars = Progress(description, *columns, console=self._console(), transient=True)
            self._bars.start()
        event = update.started
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


@cache
def _reporter_of(pid: int) -> ProgressReporter:  # a child that was forked has none of its parent's threads
    return ProgressReporter()


@hookimpl
def weight_transfer_started(event: TransferStarted) -> None:
    """See `ProgressReporter.started`."""
    _reporter_of(os.getpid()).started(event)


@hookimpl
def weight_transfer_progress(event: TransferProgress) -> None:
    """See `ProgressReporter.progress`."""
    _reporter_of(os.getpid()).progress(event)


@hookimpl
def weight_transfer_finished(event: TransferFinished) -> None:
    """See `ProgressReporter.finished`."""
    _reporter_of(os.getpid()).finished(event)
