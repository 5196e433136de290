"""An update tells where its time goes, on both sides by the same names."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weight_transfer as wt
from weight_transfer.model.checkpoint import CheckpointSource
from weight_transfer.session.phases import Phases
from weight_transfer.values.events import PHASES

TRAINER = {"init", "start", "plan", "wire", "verify", "commit"}
WORKER = {"start", "plan", "wire", "load", "verify", "wait", "commit"}


class Heard:
    """Keeps the ends of updates by role."""

    def __init__(self) -> None:
        self.ends: dict[str, wt.TransferFinished] = {}

    @wt.hookimpl
    def weight_transfer_finished(self, event: wt.TransferFinished) -> None:
        self.ends[event.role] = event


def sent(source: Any, config: dict[str, Any]) -> tuple[wt.TransferFinished, wt.TransferFinished]:
    """Send once, and return what the trainer and the worker have told of the end."""
    heard = Heard()
    with (
        wt.WeightReceiver({"backend": "loopback", **config}, nn.Linear(40, 20), observers=(heard,)) as receiver,
        wt.WeightSender({"backend": "loopback", **config}, [receiver], observers=(heard,)) as sender,
    ):
        sender.send(source)
    return heard.ends["trainer"], heard.ends["worker"]


@pytest.fixture
def seconds_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a second pass between any two looks at the clock."""
    clock = count()
    monkeypatch.setattr("weight_transfer.session.phases.time.perf_counter", lambda: float(next(clock)))


@pytest.mark.usefixtures("seconds_pass")
def test_a_phase_inside_another_one_is_taken_out_of_it() -> None:
    phases = Phases()
    with phases.within("wire"):
        for _ in range(2):
            with phases.within("load"), phases.within("verify"):
                pass
    assert list(phases.told().items()) == [("wire", 3.0), ("load", 4.0), ("verify", 2.0)]


@pytest.mark.usefixtures("seconds_pass")
def test_no_more_is_moved_than_has_passed() -> None:
    phases = Phases()
    with phases.within("wire"):
        pass
    phases.move(5.0, "wire", "gather")
    assert phases.told() == {"gather": 1.0, "wire": 0.0}


@pytest.mark.parametrize(
    ("config", "trainer", "worker"),
    [
        ({}, TRAINER, WORKER),
        ({"verify": "none"}, TRAINER - {"verify"}, WORKER - {"verify"}),
        ({"staging": "host"}, TRAINER, WORKER - {"start"}),
    ],
)
def test_both_sides_tell_their_phases_in_the_same_order(
    config: dict[str, Any], trainer: set[str], worker: set[str]
) -> None:
    ends = sent(nn.Linear(40, 20), config)
    for end, expected in zip(ends, (trainer, worker), strict=True):
        assert list(end.phases) == [phase for phase in PHASES if phase in expected]
        assert 0 < sum(end.phases.values()) <= end.seconds + 0.02  # they are taken by another clock
    of_workers = list(ends[0].worker_phases.values())
    assert of_workers == [{phase: ends[1].phases[phase] for phase in of_workers[0]}]
    assert set(of_workers[0]) == worker - {"wait", "commit"}


def test_what_a_source_reads_is_gathered(tmp_path: Path) -> None:
    save_file(nn.Linear(40, 20).state_dict(), tmp_path / "model.safetensors")
    trainer, worker = sent(CheckpointSource(tmp_path), {"link_gbps": 2.0})
    assert trainer.phases["gather"] > 0 and "gather" not in worker.phases
    for end in (trainer, worker):
        assert end.link_fraction == pytest.approx(end.bytes_per_second / 2e9)


def test_an_update_that_fails_tells_the_phases_that_it_came_to() -> None:
    heard = Heard()

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        raise RuntimeError("full")

    config = {"backend": "loopback"}
    with (
        wt.WeightReceiver(config, nn.Linear(4, 2), load_weights=load, observers=(heard,)) as receiver,
        wt.WeightSender(config, [receiver], observers=(heard,)) as sender,
        pytest.raises(wt.TransferError, match="full"),
    ):
        sender.send(nn.Linear(4, 2))
    assert set(heard.ends["trainer"].phases) == TRAINER - {"verify", "commit"}
    assert set(heard.ends["worker"].phases) == WORKER - {"wait", "commit"}
