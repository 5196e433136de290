"""What waits end with: what they wait for, the deadline, or what is raised meanwhile."""

from __future__ import annotations

import threading

import pytest

import weight_transfer.values.deadline
from weight_transfer.errors import TransferError, TransferTimeoutError
from weight_transfer.values.deadline import Deadline


@pytest.mark.parametrize("awake", [60.0, 0.0])
def test_a_wait_ends_with_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, awake: float) -> None:
    monkeypatch.setattr(weight_transfer.values.deadline, "_AWAKE", awake)
    asked, happened = threading.Event(), threading.Event()

    def has_happened() -> bool:
        asked.set()
        return happened.is_set()

    def happen() -> None:
        asked.wait()
        happened.set()

    thread = threading.Thread(target=happen)
    thread.start()
    Deadline(60.0).wait_for(has_happened, "waiting for the other thread")
    thread.join()
    assert happened.is_set()


@pytest.mark.parametrize("awake", [60.0, 0.0])
def test_a_wait_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch, awake: float) -> None:
    monkeypatch.setattr(weight_transfer.values.deadline, "_AWAKE", awake)
    with pytest.raises(TransferTimeoutError, match="while waiting for nothing") as caught:
        Deadline(0.01).wait_for(lambda: False, "waiting for nothing", backend="ipc", phase="update", peer="trainer")
    assert (caught.value.backend, caught.value.phase, caught.value.peer) == ("ipc", "update", "trainer")


def test_what_has_happened_counts_though_the_deadline_has_passed() -> None:
    Deadline(0.0).wait_for(lambda: True, "waiting for what has happened")


def test_a_wait_ends_with_what_its_predicate_raises() -> None:
    def is_stopped() -> bool:
        raise TransferError("The transfer was stopped.")

    with pytest.raises(TransferError, match="stopped"):
        Deadline(60.0).wait_for(is_stopped, "moving weights")
