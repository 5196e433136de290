"""Who is measured where: apart if there are GPUs enough, else side by side, and no larger than there is room."""

from __future__ import annotations

import os

import pytest

from weight_transfer.bench.configurations import model_shape
from weight_transfer.bench.placing import budget, devices, require_room, room
from weight_transfer.errors import ConfigError


@pytest.mark.parametrize(
    ("trainers", "workers", "one_each", "gpus", "expected"),
    [
        (1, 2, True, 3, ("0", "12")),
        (1, 1, False, 1, ("0", "0")),
        (2, 2, False, 4, ("01", "23")),
        (2, 2, False, 2, ("01", "01")),
        (1, 3, False, 2, ("0", "010")),
    ],
)
def test_on_gpus_they_are_apart_if_there_are_enough(
    trainers: int, workers: int, one_each: bool, gpus: int, expected: tuple[str, str]
) -> None:
    found = devices("cuda", trainers, workers, one_each, gpus)
    assert found == tuple(tuple(f"cuda:{number}" for number in side) for side in expected)


def test_too_few_gpus_are_an_error() -> None:
    with pytest.raises(ConfigError, match="it needs 2 GPUs, one for each process, and finds 1"):
        devices("cuda", 1, 1, one_each=True, gpus=1)
    with pytest.raises(ConfigError, match="it needs 1 GPU and finds 0"):
        devices("cuda", 1, 1, one_each=False, gpus=0)


def test_more_processes_leave_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 3 * 10**6, "SC_PAGE_SIZE": 1000}.__getitem__)
    few, many = devices("cpu", 1, 1, False, 0), devices("cpu", 2, 8, False, 0)
    assert room(*few) == 2 * 10**9 // 5 > room(*many)
    assert budget(*few) == 96_000_000 and budget(*many) == room(*many)
    with pytest.raises(ConfigError, match=r"1 of its 48 layers has 2.49 GB, .* room for 400 MB in each of 2"):
        require_room(model_shape("qwen3-30b-a3b", 1), *few, 1)
