"""Whose update it is, between real processes: trainers that are replaced, interrupted or killed; workers that wait."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from weight_transfer import LifecycleError, ReplacedError, TransferTimeoutError
from weight_transfer.testing.actors import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.actors import Actor, Spawn

IPC: dict[str, Any] = {"backend": "ipc", "timeout": 30, "init_timeout": 20}
NCCL: dict[str, Any] = IPC | {"backend": "nccl"}
TCP: dict[str, Any] = IPC | {"backend": "rdma", "rdma": {"transport": "tcp", "adopt": False}}
BOTH = pytest.mark.parametrize("config", [IPC, NCCL], ids=["ipc", "nccl"])
ALL = pytest.mark.parametrize("config", [IPC, NCCL, TCP], ids=["ipc", "nccl", "rdma"])
AT_ONCE = 5.0  # seconds; the deadlines are longer


def serves(worker: Actor, version: int) -> Callable[[], bool]:
    return lambda: worker.ask("status")["version"] == version


def is_in(state: str, worker: Actor) -> Callable[[], bool]:
    return lambda: worker.ask("status")["state"] == state


@ALL
def test_a_trainer_that_stood_still_while_it_was_replaced_publishes_nothing(
    spawn: Spawn, config: dict[str, Any]
) -> None:
    worker = spawn("worker", seed=11, config=config)
    stale = spawn("trainer", config=config, workers=[worker.hello])
    stale.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=1)
    stale.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    with stale.stopped():
        successor = spawn("trainer", config=config, workers=[worker.hello])
        worker.ask("arm")
        worker.ask("release")
        since = time.monotonic()
        sent = successor.ask("send", seed=3, version=3)
        assert time.monotonic() - since < AT_ONCE
        assert worker.ask("digest") == sent["digest"]
    assert isinstance(stale.error(), ReplacedError)  # it was in its update, or about to finish it
    assert worker.ask("digest") == sent["digest"]
    assert worker.ask("status")["version"] == 3
    sent = successor.ask("send", seed=4, version=4)
    assert (worker.ask("digest"), worker.ask("status")["version"]) == (sent["digest"], 4)
    stale.tell("send", seed=5, version=5)
    assert isinstance(stale.error(), ReplacedError)
    assert (worker.ask("digest"), worker.ask("status")["version"]) == (sent["digest"], 4)


@BOTH
def test_a_trainer_whose_start_times_out_lets_the_worker_serve_again_at_once(
    spawn: Spawn, config: dict[str, Any]
) -> None:
    holding, free = (spawn("worker", seed=seed, config=config) for seed in (11, 12))
    trainer = spawn("trainer", config=config | {"timeout": 2}, workers=[holding.hello, free.hello])
    trainer.ask("send", seed=1, version=1)
    holding.ask("hold")
    error = None
    trainer.tell("send", seed=2, version=2)
    error = trainer.error(20)
    assert isinstance(error, TransferTimeoutError)
    assert error.peer == holding.hello
    for worker in (holding, free):
        assert eventually(serves(worker, 1), AT_ONCE), "its own deadline is 30 s"
    holding.ask("let_go")
    sent = trainer.ask("send", seed=3, version=3)
    assert [worker.ask("digest") for worker in (holding, free)] == [sent["digest"]] * 2


@BOTH
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_a_trainer_that_ends_while_it_waits_for_samplers_lets_all_workers_serve_at_once(
    spawn: Spawn, config: dict[str, Any], how: signal.Signals
) -> None:
    holding = spawn("worker", seed=11, config=config)
    free = spawn("worker", seed=12, config=config)
    trainer = spawn("trainer", config=config, workers=[holding.hello, free.hello])
    trainer.ask("send", seed=1, version=1)
    holding.ask("hold")
    trainer.tell("send", seed=2, version=2)
    for worker in (holding, free):
        assert eventually(is_in("updating", worker), 10)
    os.kill(trainer.pid, how)
    assert eventually(serves(holding, 1), AT_ONCE)
    if how is signal.SIGINT or config is IPC:  # over nccl a worker hears of a trainer's death at its next update only
        assert eventually(serves(free, 1), AT_ONCE)
    holding.ask("let_go")
    if how is signal.SIGINT:
        assert "KeyboardInterrupt" in str(trainer.error())
        successor = trainer
    else:
        successor = spawn("trainer", config=config, workers=[holding.hello, free.hello])
    sent = successor.ask("send", seed=3, version=3)
    assert [worker.ask("digest") for worker in (holding, free)] == [sent["digest"]] * 2


def test_a_trainer_that_dies_between_two_updates_leaves_a_worker_that_says_so(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=IPC)
    trainer = spawn("trainer", config=IPC, workers=[worker.hello])
    sent = trainer.ask("send", seed=1, version=1)
    assert worker.ask("status")["state"] == "ready"
    trainer.kill()
    assert eventually(is_in("created", worker), AT_ONCE)
    assert worker.ask("status")["version"] == 1
    assert worker.ask("digest") == sent["digest"]


@BOTH
def test_the_send_after_a_failed_join_succeeds(spawn: Spawn, config: dict[str, Any]) -> None:
    worker = spawn("worker", seed=11, config=config)
    broken = spawn("worker", seed=12, config=config, breaks_at_init=True)
    trainer = spawn("trainer", config=config, workers=[worker.hello, broken.hello])
    for _ in range(2):
        trainer.tell("send", seed=1, version=1)
        assert "this worker was told not to join" in str(trainer.error(15))
    trainer.ask("remove_worker", worker=broken.hello)
    sent = trainer.ask("send", seed=2, version=2)
    assert worker.ask("digest") == sent["digest"]


@BOTH
def test_the_send_after_a_join_that_ran_out_of_time_succeeds(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"init_timeout": 2}
    worker, stopped = (spawn("worker", seed=seed, config=config) for seed in (11, 12))
    trainer = spawn("trainer", config=config, workers=[worker.hello, stopped.hello])
    trainer.ask("send", seed=1, version=1)
    trainer.ask("remove_worker", worker=worker.hello)  # all have to join again, then
    trainer.ask("add_worker", worker=worker.hello)
    with stopped.stopped():
        trainer.tell("send", seed=2, version=2)
        assert isinstance(trainer.error(30), TransferTimeoutError)
    sent = trainer.ask("send", seed=3, version=3)
    assert [actor.ask("digest") for actor in (worker, stopped)] == [sent["digest"]] * 2


def test_a_new_trainer_goes_on_after_the_version_that_workers_serve(spawn: Spawn) -> None:
    workers = [spawn("worker", seed=seed, config=IPC) for seed in (11, 12)]
    spawn("trainer", config=IPC, workers=[workers[0].hello]).ask("send", seed=1, version=57)
    spawn("trainer", config=IPC, workers=[workers[1].hello]).ask("send", seed=1, version=3)
    successor = spawn("trainer", config=IPC, workers=[worker.hello for worker in workers])
    assert successor.ask("send", seed=2, version=None)["version"] == 58
    assert successor.ask("send", seed=2, version=None)["version"] == 59
    assert [worker.ask("status")["version"] for worker in workers] == [59, 59]


def test_a_call_of_a_session_that_the_worker_has_not_joined_is_refused_over_http(spawn: Spawn) -> None:
    from weight_transfer.control import HttpChannel

    worker = spawn("worker", seed=11, config=IPC)
    spawn("trainer", config=IPC, workers=[worker.hello]).ask("send", seed=1, version=1)
    with HttpChannel(worker.hello) as stranger:
        calls: list[Callable[[], object]] = [
            lambda: stranger.start_weight_update("another"),
            lambda: stranger.update_weights({"timeout": 1, "session": "another"}),
            lambda: stranger.finish_weight_update(9, "another"),
            lambda: stranger.abort_weight_update("I do not like it", "another"),
        ]
        for call in calls:
            since = time.monotonic()
            with pytest.raises(ReplacedError, match=r"is refused: another trainer \(lease \d+\)") as caught:
                call()
            assert isinstance(caught.value, LifecycleError)
            assert time.monotonic() - since < AT_ONCE
    status = worker.ask("status")
    assert (status["state"], status["version"]) == ("ready", 1)
