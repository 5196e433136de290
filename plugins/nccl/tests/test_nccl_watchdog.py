"""A deadline ends what blocks, whenever it is set, and nothing that is over."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.watchdog import Watchdog

NAME = "weight-transfer nccl watchdog"


class Blocked:
    """Blocks until it is ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.watchdog = Watchdog(self.end)

    def end(self) -> None:
        self.ended.set()


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    before = threads()
    blocked = Blocked()
    yield blocked
    blocked.watchdog.close()
    for thread in threads() - before:
        thread.join(10)
        assert not thread.is_alive()


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == NAME}


@pytest.mark.parametrize("before", [None, 0.3, 3600])
def test_a_deadline_ends_what_blocks_whatever_was_watched_before(blocked: Blocked, before: float | None) -> None:
    if before is not None:
        with blocked.watchdog.watching(Deadline(before)):
            pass
    with blocked.watchdog.watching(Deadline(0.2)):
        assert blocked.ended.wait(10)


def test_a_deadline_of_which_little_is_left_ends_what_blocks(blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    with blocked.watchdog.watching(Deadline(3600)):  # its thread is going to sleep for a minute
        pass
    late = Deadline(3600)
    monkeypatch.setattr(late, "_end", Deadline(0.2)._end)
    with blocked.watchdog.watching(late):
        assert blocked.ended.wait(10)


def test_a_thread_that_could_not_be_started_is_started_next_time(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"), blocked.watchdog.watching(Deadline(0.2)):
            pass
    with blocked.watchdog.watching(Deadline(0.2)):
        assert blocked.ended.wait(10)


def test_what_is_over_is_not_ended_and_one_thread_watches_over_all(blocked: Blocked) -> None:
    others = threads()
    for _ in range(5):
        with blocked.watchdog.watching(Deadline(0.1)):
            pass
    assert len(threads() - others) == 1
    assert not blocked.ended.wait(0.3)
    with blocked.watchdog.watching(Deadline(0.1)):
        assert blocked.ended.wait(10)


def test_it_keeps_nothing_of_what_it_watches_over() -> None:
    others = threads()
    blocked = Blocked()
    with blocked.watchdog.watching(Deadline(3600)):
        pass
    (thread,) = threads() - others
    gone, watchdog = weakref.ref(blocked), blocked.watchdog
    del blocked
    gc.collect()
    assert gone() is None
    watchdog.close()
    thread.join(10)
    assert not thread.is_alive()
