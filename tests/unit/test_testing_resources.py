"""What the kit counts as left behind."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import torch

from weight_transfer.control import line_server
from weight_transfer.session import calls
from weight_transfer.testing import resources
from weight_transfer.testing.conformance.cast import Cast
from weight_transfer.testing.resources import abandoned, held, threads


@pytest.fixture
def file() -> Iterator[Path]:
    """A file that nobody holds, in a folder that this test holds: other tests look at ``/dev/shm`` meanwhile."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        held = os.open(folder, os.O_RDONLY)
        path = Path(folder, "a file")
        path.write_bytes(bytes(4096))
        yield path
    os.close(held)


def _is_abandoned(file: Path) -> bool:
    return file.name in abandoned(str(file.parent))


def test_a_file_that_nobody_holds_is_abandoned(file: Path) -> None:
    assert _is_abandoned(file)
    assert file.parent.name not in abandoned()


def test_a_file_that_is_open_or_mapped_is_not(file: Path) -> None:
    with file.open("r+b") as opened:
        assert not _is_abandoned(file)
        mapped = mmap.mmap(opened.fileno(), 4096)
    assert not _is_abandoned(file)
    mapped.close()
    assert _is_abandoned(file)


def test_another_process_holds_it_too(file: Path) -> None:
    code = f"file = open({str(file)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not _is_abandoned(file)
        other.communicate(b"\n")
    assert _is_abandoned(file)


def test_a_semaphore_is_held_though_its_file_was_made_under_another_name() -> None:
    before = set(Path("/dev/shm").iterdir())
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    made = {path.name for path in set(Path("/dev/shm").iterdir()) - before}
    assert any(name.startswith("sem.") for name in made)
    assert not made & abandoned()
    del semaphore


def test_members_in_this_process_compute_on_one_thread_each_though_sessions_before_had_more() -> None:
    assert len(_intra_op_threads()) == 2
    cast = Cast({}, device=lambda rank: "cpu", in_process=True)
    try:
        assert _intra_op_threads() == [1, 1]
    finally:
        cast.end()


def _intra_op_threads() -> list[int]:
    """Return what torch says on a thread that makes calls, and on one that answers them."""
    said: list[Future[int]] = [Future(), Future()]
    for kept, future in zip((calls._threads, line_server.THREADS), said, strict=True):
        kept.run(partial(_say_threads, future))
    return [future.result(10) for future in said]


def _say_threads(future: Future[int]) -> None:
    future.set_result(torch.get_num_threads())


def test_threads_of_a_backend_are_counted_and_those_of_the_core_that_end_by_themselves_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["MainThread", "weight-transfer watch", "weight-transfer acme watch", "weight-transfer worker call"]
    monkeypatch.setattr(resources, "threads", lambda: dict(enumerate(names)))
    assert held()["threads"] == 2


def test_a_thread_of_the_control_channel_that_ends_meanwhile_is_not_taken_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, ends, listdir = held()["threads"], threading.Event(), os.listdir
    passing = threading.Thread(target=ends.wait, name="weight-transfer call")
    passing.start()
    assert passing.native_id is not None and threads()[passing.native_id] == passing.name

    def late(path: str) -> list[str]:
        ends.set()
        passing.join()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", late)
    assert held()["threads"] >= before
