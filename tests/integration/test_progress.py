"""The observer ``progress``: silent about what is quick, a bar and a line for the rest."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

from rich.console import Console

import weight_transfer as wt
from weight_transfer.observers.progress import ProgressReporter
from weight_transfer.testing.actors import eventually

SIZES = {"backend": "ipc", "version": 7, "nbytes": 2_000_000_000}
SEND = """
import os
import torch, weight_transfer as wt
from weight_transfer.observers import progress
from weight_transfer.testing.actors import eventually

reporter = progress._reporter_of(os.getpid())
reporter._patience = 0

def load(weights):
    assert eventually(lambda: all(update.shown for update in list(reporter._updates.values())), within=30)

config = wt.load_config(backend="loopback", observers=["progress"])
model = torch.nn.Linear(1000, 2500)
with wt.WeightReceiver(config, model, load_weights=load) as receiver:
    with wt.WeightSender(config, workers=[receiver]) as sender:
        sender.send(model, version=7)
"""


def started(role: str = "trainer") -> wt.TransferStarted:
    return wt.TransferStarted(role=role, params=3, workers=1, **SIZES)


def finished(role: str = "trainer", error: str | None = None) -> wt.TransferFinished:
    return wt.TransferFinished(role=role, seconds=4.0, error=error, **SIZES)


class Screen(Console):
    """A console that keeps what it was given and tells when something came."""

    def __init__(self, terminal: bool) -> None:
        self.text = io.StringIO()
        super().__init__(file=self.text, force_terminal=terminal, width=100)


def shown(reporter: ProgressReporter, role: str = "trainer") -> None:
    """Wait until the reporter's patience with an update is over."""
    assert eventually(lambda: reporter._updates[role].shown, within=30)


def test_a_quick_update_leaves_no_trace() -> None:
    screen = Screen(terminal=True)
    reporter = ProgressReporter(screen, patience=1000)
    reporter.started(started())
    reporter.progress(wt.TransferProgress(role="trainer", backend="ipc", version=7, done=1, total=2))
    reporter.finished(finished())
    assert screen.text.getvalue() == ""


def test_a_slow_update_gets_a_bar_and_then_a_line() -> None:
    screen = Screen(terminal=True)
    reporter = ProgressReporter(screen, patience=0)
    reporter.started(started())
    shown(reporter)
    reporter.progress(wt.TransferProgress(role="trainer", backend="ipc", version=7, done=10**9, total=2 * 10**9))
    assert reporter._bars is not None
    reporter._bars.refresh()
    reporter.finished(finished())
    text = screen.text.getvalue()
    assert "1.0/2.0 GB" in text
    assert text.endswith("trainer: version 7 over ipc: 2.00 GB in 4.0 s, 500 MB/s\n")


def test_without_a_terminal_there_is_the_line_alone() -> None:
    screen = Screen(terminal=False)
    reporter = ProgressReporter(screen, patience=0)
    reporter.started(started())
    shown(reporter)
    reporter.finished(finished(error="a worker died."))
    assert screen.text.getvalue() == "trainer: version 7 over ipc failed after 4.0 s: a worker died.\n"


def test_one_thread_looks_at_all_updates_and_ends_with_them() -> None:
    reporter = ProgressReporter(Screen(terminal=False), patience=1000)
    before = threading.active_count()
    for _ in range(50):
        for role in ("trainer", "worker"):
            reporter.started(started(role))
        assert threading.active_count() <= before + 2
        for role in ("trainer", "worker"):
            reporter.finished(finished(role))
    assert eventually(lambda: not reporter._looking, within=30)


def test_receivers_of_one_process_share_a_line() -> None:
    screen = Screen(terminal=False)
    reporter = ProgressReporter(screen, patience=0)
    for _ in range(2):
        reporter.started(started("worker"))
    shown(reporter, "worker")
    reporter.started(started("trainer"))
    shown(reporter)
    for role in ("worker", "trainer", "worker", "worker"):
        reporter.finished(finished(role))
    assert [line.partition(":")[0] for line in screen.text.getvalue().splitlines()] == ["trainer", "worker"]


def test_a_config_enables_it() -> None:
    done = subprocess.run([sys.executable, "-c", SEND], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    lines = [line.partition(" in ")[0] for line in done.stderr.splitlines()]
    assert sorted(lines) == [f"{role}: version 7 over loopback: 10.0 MB" for role in ("trainer", "worker")]
