"""The workers as a whole, between real processes: a commit that is cut in two, and workers that come and go."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from weight_transfer import HttpChannel, ReplacedError, StaleCommitError
from weight_transfer.testing.actors import Actor, eventually
from weight_transfer.testing.models import weight

WEIGHTS = [weight(f"layer{index}", "bfloat16", 128, 96) for index in range(4)]
AT_ONCE = 5.0  # seconds; the deadlines are longer


@pytest.fixture
def play() -> Iterator[Callable[..., Actor]]:
    """Start an actor of the kit with one member, whose name is ``it``."""
    with ExitStack() as stack:

        def start(role: str, **spec: Any) -> Actor:
            actor = Actor(f"weight_transfer.testing.{role}", threads=1)
            stack.callback(actor.stop)
            actor.ready()
            actor.hello = actor.ask("open", name="it", weights=WEIGHTS, **spec)
            return actor

        yield start


def config(backend: str) -> dict[str, Any]:
    return {"backend": backend, "timeout": 30, "init_timeout": 20}


def statuses(workers: list[Actor]) -> list[dict[str, Any]]:
    return [worker.ask("status", name="it") for worker in workers]


def health(worker: Actor) -> int:
    return httpx.get(f"{worker.hello}/healthz").status_code


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_trainer_that_is_cut_off_between_two_commits_leaves_workers_that_say_so_and_the_next_one_resolves_it(
    play: Callable[..., Actor], how: signal.Signals
) -> None:
    workers = [play("worker", config=config("ipc")) for _ in range(2)]
    urls = [worker.hello for worker in workers]
    trainer = play("trainer", config=config("ipc"), workers=urls)
    trainer.ask("send", name="it", seed=1, version=1)
    trainer.ask("hold", name="it", at="finish")
    trainer.tell("send", name="it", seed=2, version=2)
    assert trainer.reply() == "held"
    assert eventually(lambda: 2 in [status["version"] for status in statuses(workers)], 20)
    published, prepared = sorted(statuses(workers), key=lambda status: status["state"])
    update = published["updates"]["model"]
    assert (published["state"], published["version"], published["prepared"]) == ("ready", 2, None)
    assert (prepared["state"], prepared["version"], prepared["committed"]) == ("updating", None, {"model": 1})
    assert prepared["prepared"] == {"target": "model", "version": 2, "update": update}
    waits = next(worker for worker in workers if worker.ask("status", name="it")["state"] == "updating")

    with ExitStack() as stack:
        if how is signal.SIGKILL:
            trainer.kill()
            assert eventually(lambda: waits.ask("status", name="it")["state"] == "failed", AT_ONCE)
            status = waits.ask("status", name="it")
            assert status["error"].endswith("(version 2 had arrived, and was not published)")
            assert (status["version"], status["prepared"], status["committed"]) == (None, None, {"model": 1})
            assert [health(worker) for worker in workers] == [503 if worker is waits else 200 for worker in workers]
        else:
            stack.enter_context(trainer.stopped())
        successor = play("trainer", config=config("ipc"), workers=urls)
        successor.tell("send", name="it", seed=3, version=3)
        sent = successor.reply(AT_ONCE)
    if how is signal.SIGSTOP:
        trainer.tell("release")
        assert isinstance(trainer.error(AT_ONCE), ReplacedError)
    assert [worker.ask("hashes", name="it") for worker in workers] == [sent["hashes"]] * 2
    assert [status["version"] for status in statuses(workers)] == [3, 3]
    assert [health(worker) for worker in workers] == [200, 200]


def test_a_commit_that_is_played_again_is_refused(play: Callable[..., Actor]) -> None:
    worker = play("worker", config=config("ipc"))
    trainer = play("trainer", config=config("ipc"), workers=[worker.hello])
    trainer.ask("send", name="it", seed=1, version=1)
    [sent] = trainer.ask("infos", name="it")
    session, update = sent["init"][0]["session"], sent["update"][0]["update"]
    with HttpChannel(worker.hello) as again:
        with pytest.raises(StaleCommitError, match=f"of update '{update}' is refused: no update waits for that here"):
            again.finish_weight_update(1, session, update)
        trainer.ask("hold", name="it", at="finish")
        trainer.tell("send", name="it", seed=2, version=2)
        assert trainer.reply() == "held"
        with pytest.raises(StaleCommitError, match=f"of update '{update}' is refused: update '[0-9a-f]+' has arrived"):
            again.finish_weight_update(2, session, update)
        assert worker.ask("status", name="it")["version"] is None
    trainer.tell("release")
    sent = trainer.reply()
    assert worker.ask("hashes", name="it") == sent["hashes"]


@pytest.mark.parametrize("backend", ["ipc", "rdma", "nccl"])
def test_workers_come_and_go_and_the_others_keep_their_ranks_and_connections(
    play: Callable[..., Actor], backend: str
) -> None:
    """Where the backend can; over ``nccl`` all join anew."""
    settings = config(backend) | {"on_worker_failure": "continue"}
    if backend == "rdma":
        settings |= {"rdma": {"transport": "tcp"}}
    victim, survivor = (play("worker", config=settings) for _ in range(2))
    trainer = play("trainer", config=settings, workers=[victim.hello, survivor.hello])
    trainer.ask("send", name="it", seed=1, version=1)
    victim.kill()
    sent = trainer.ask("send", name="it", seed=2, version=2)
    assert [address for address, _ in sent["lost"]] == [victim.hello]
    assert survivor.ask("hashes", name="it") == sent["hashes"]
    back = play("worker", config=settings, port=int(victim.hello.rpartition(":")[2]))
    assert back.ask("status", name="it")["version"] is None
    sent = trainer.ask("send", name="it", seed=3, version=3)
    assert (sent["lost"], sorted(sent["workers"])) == ([], sorted([back.hello, survivor.hello]))
    assert [worker.ask("hashes", name="it") for worker in (back, survivor)] == [sent["hashes"]] * 2
    joins = [[info["rank_offset"] for info in told["init"]] for told in trainer.ask("infos", name="it")]
    assert joins == ([[1, 1], [2, 1, 2]] if backend == "nccl" else [[1, 1], [2]])
