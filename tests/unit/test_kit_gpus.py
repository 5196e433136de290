"""How the conformance kit shares GPUs out, and how many each of its tests asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weight_transfer.testing import gpus
from weight_transfer.testing.actors import PROCESSES
from weight_transfer.testing.gpus import taken, visible_gpus

pytest_plugins = ["pytester"]

_NAMES = ["0", "1", "2", "3"]
_SOON = 10.0  # seconds


def _take(count: int, folder: Path, pipe: Any) -> None:
    with taken(count, _NAMES, folder) as own:
        pipe.send(own)
        pipe.recv()


class Holder:
    """A process that takes GPUs, says which, and gives them back when it is told."""

    def __init__(self, count: int, folder: Path) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_take, args=(count, folder, theirs))
        self._process.start()
        theirs.close()

    def has(self, within: float = _SOON) -> tuple[int, ...] | None:
        return self._pipe.recv() if self._pipe.poll(within) else None

    def give_back(self) -> None:
        self._pipe.send("give them back")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Callable[[int], Holder]]:
    started: list[Holder] = []

    def start(count: int) -> Holder:
        started.append(Holder(count, tmp_path))
        return started[-1]

    yield start
    for holder in started:
        holder.kill()


def test_processes_share_gpus_out_and_whoever_needs_more_than_are_free_waits(
    holders: Callable[[int], Holder],
) -> None:
    first, second = holders(2), holders(2)
    assert {first.has(), second.has()} == {(0, 1), (2, 3)}
    third = holders(3)
    first.give_back()
    assert third.has(within=0.3) is None
    second.give_back()
    assert third.has() == (0, 1, 2, 3)


def test_waiting_for_gpus_ends_and_those_of_a_process_that_was_killed_are_free(
    holders: Callable[[int], Holder], tmp_path: Path
) -> None:
    holder = holders(4)
    assert holder.has()
    with pytest.raises(TimeoutError, match=r"No 2 GPUs came free within 0\.2 s"), taken(2, _NAMES, tmp_path, 0.2):
        pass
    holder.kill()
    with taken(2, _NAMES, tmp_path, _SOON) as own:
        assert own in ((0, 1), (2, 3))


def test_whoever_needs_none_waits_for_nothing(tmp_path: Path) -> None:
    with taken(0, _NAMES, tmp_path) as own:
        assert own == ()
    assert not list(tmp_path.iterdir())


def test_gpus_are_named_alike_by_processes_that_see_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    assert visible_gpus(2) == ["3", "2"]


_WAITING = """
import pytest
from weight_transfer.testing.gpus import OWN

@pytest.mark.timeout(1)
def test_which(request):
    assert request.node.stash[OWN] in ((0, 1), (2, 3))
"""


def test_a_test_gets_its_own_gpus_and_waiting_for_them_is_not_part_of_its_time(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: Callable[[int], Holder]
) -> None:
    monkeypatch.setattr(gpus, "_folder", lambda: tmp_path)
    holder = holders(4)
    assert holder.has()
    giving_back = threading.Timer(2, holder.give_back)
    giving_back.start()
    pytester.makepyfile(_WAITING)
    pytester.inline_run("-p", "no:cacheprovider", plugins=[gpus.OwnGpus(lambda _: 2, _NAMES)]).assertoutcome(passed=1)


_KITS = """
from weight_transfer.testing import BackendConformance

class TestNccl(BackendConformance):
    backend = "nccl"

class TestIpc(BackendConformance):
    backend = "ipc"

class TestFiles(BackendConformance):
    backend = "files"
"""


def test_tests_whose_processes_use_nccl_ask_for_as_many_gpus_as_these_are(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    wanted = {
        f"{item.cls.__name__}::{item.name}": item.cls.gpus_of_its_own(item)  # type: ignore[attr-defined]
        for item in pytester.getitems(_KITS)
    }
    for name, count in {
        "TestNccl::test_every_bit_arrives_from_a_to_b_and_back[1 workers-loader]": 2,
        "TestNccl::test_every_bit_arrives_from_a_to_b_and_back[3 workers-loader]": 4,
        "TestNccl::test_tens_of_megabytes_reach_several_workers[3 workers]": 4,
        "TestNccl::test_every_layout_reaches_every_layout[tp on 2-rows on 2]": 4,
        "TestNccl::test_every_layout_reaches_every_layout[tp on 4-whole on 1]": 0,  # skipped: there are not as many
        "TestNccl::test_a_worker_killed_in_an_update_is_named_and_comes_back": 3,
        "TestNccl::test_creating_an_engine_acquires_nothing": 0,
        "TestIpc::test_every_bit_arrives_from_a_to_b_and_back[3 workers-loader]": 0,
        "TestIpc::test_every_layout_reaches_every_layout[tp on 2-rows on 2]": 2,
        "TestIpc::test_every_layout_reaches_every_layout[plain on 1-whole on 2]": 0,
        "TestIpc::test_a_rank_that_is_killed_is_named_by_all_others[ready]": 4,
        "TestFiles::test_every_bit_arrives_from_a_to_b_and_back[3 workers-loader]": 0,
    }.items():
        assert wanted[name] == count, name
