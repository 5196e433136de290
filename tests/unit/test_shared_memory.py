"""Memory that is seen by others and cannot be changed by them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from weight_transfer.memory import shared_memory
from weight_transfer.memory.shared_memory import PrivateView, SharedMemory


def _pair(nbytes: int) -> tuple[torch.Tensor, PrivateView]:
    memory = SharedMemory(nbytes)
    return memory.storage(0, nbytes), PrivateView(os.dup(memory.fd), nbytes)


def test_writes_into_a_private_view_stay_there_until_it_is_renewed() -> None:
    owner, view = _pair(20_000)
    owner.fill_(1)
    view.data[:10_000] = 2
    assert owner.eq(1).all()
    owner.fill_(3)
    view.renew()
    assert view.data.eq(3).all()


def test_a_part_of_a_view_is_renewed_by_itself() -> None:
    owner, view = _pair(4 * 4096)
    view.data.fill_(2)
    view.renew(4096 + 100, 4096)
    assert view.data.reshape(4, -1).eq(0).all(1).tolist() == [False, True, True, False]
    assert owner.eq(0).all()


@pytest.mark.parametrize("nbytes", [1, 5000, 5 * 2**20])
def test_pages_that_were_written_are_found(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_PAGES", 100)
    owner, view = _pair(nbytes)
    written: Callable[[], bool] = lambda: shared_memory._written(view.data.data_ptr(), nbytes)  # noqa: E731
    assert not written()
    owner.fill_(1)
    assert view.data.eq(1).all()
    assert not written()
    view.data[-1] = 2
    assert written()
    view.renew()
    assert not written()


def test_without_a_pagemap_everything_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, view = _pair(5000)
    view.data.fill_(2)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    view.renew()
    assert torch.equal(owner, view.data)


def test_only_weights_are_parted_and_processes_that_are_started_part_nothing() -> None:
    weights, other = SharedMemory(5000, parts=True), SharedMemory(5000)
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert not weights.parted
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert weights.parted
    assert not other.parted
    weights.storage(0, 1).fill_(9)
    assert os.pread(weights.fd, 1, 0) == b"\0"


def test_a_kernel_that_refuses_to_part_is_told_of() -> None:
    memory = SharedMemory(5000, parts=True)
    address, memory.address = memory.address, 1  # not a page
    try:
        with pytest.raises(OSError, match="stay shared with a forked child"):
            memory.part()
    finally:
        memory.address = address
    assert not memory.parted
