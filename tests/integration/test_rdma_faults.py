"""The rdma backend when something dies or stands still in the middle of a read: the right error, and quiet memory."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from weight_transfer import PeerLostError, TransferError, TransferTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.actors import Actor, Spawn

ROWS = 120_000  # of 512 bytes: a read over TCP takes a tenth of a second or more
TIMEOUT = 4
TRANSPORTS = pytest.mark.parametrize("transport", ["tcp", pytest.param("shm", marks=pytest.mark.slow)])


def _config(transport: str) -> dict[str, Any]:
    slow = {"TCP_TX_SEG_SIZE": "4k", "TCP_RX_SEG_SIZE": "4k"} if transport == "tcp" else {}
    return {
        "backend": "rdma",
        "timeout": TIMEOUT,
        "init_timeout": 30,
        "rdma": {"transport": transport, "ucx": slow},
    }


def _pair(spawn: Spawn, transport: str) -> tuple[Actor, Actor]:
    """Return a trainer and a worker with one version behind them."""
    config = _config(transport)
    worker = spawn("worker", seed=11, config=config, in_place=True, rows=ROWS)
    trainer = spawn("trainer", config=config, workers=[worker.hello], rows=ROWS)
    trainer.ask("send", seed=1, version=1)
    return trainer, worker


@pytest.mark.parametrize(
    ("options", "transport", "warnings"),
    [
        ({"ucx": {"TLS": "tcp,self"}}, "tcp (", ["UCX reads from the trainer over TCP"]),
        ({"transport": "tcp", "link_rate": 1e-3}, "tcp (", []),
        ({"transport": "tcp", "link_rate": 1e6}, "tcp (", ["less than half of its share of the link"]),
    ],
)
def test_the_report_tells_the_transport_and_warns_of_a_slow_one(
    spawn: Spawn, options: dict[str, Any], transport: str, warnings: list[str]
) -> None:
    """Every update says so again, not only the first."""
    config = {"backend": "rdma", "timeout": 30, "init_timeout": 30, "rdma": options}
    rows = 140_000  # 72 MB: of less nothing is said
    worker = spawn("worker", seed=11, config=config, in_place=True, rows=rows)
    trainer = spawn("trainer", config=config, workers=[worker.hello], rows=rows)
    for version in (1, 2):
        sent = trainer.ask("send", seed=version, version=version)
        assert worker.ask("digest") == sent["digest"]
        assert sent["transports"][worker.hello].startswith(transport)
        assert len(sent["warnings"]) == len(warnings)
        for text, words in zip(sent["warnings"], warnings, strict=True):
            assert text.startswith(f"{worker.hello}: ")
            assert words in text


def _agent(actor: Actor) -> int:
    """Return the process of an actor's NIXL agent."""
    children = [
        int(child)
        for thread in Path(f"/proc/{actor.pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    (agent,) = [child for child in children if b"weight_transfer_rdma.agent" in _command(child)]
    return agent


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@contextmanager
def _stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _send_until_half_way(trainer: Actor, worker: Actor, seed: int, version: int) -> None:
    """Begin an update and return while the bytes arrive."""
    worker.ask("fill", value=251)
    trainer.tell("send", seed=seed, version=version)
    until = time.monotonic() + 20
    while worker.ask("peek")[0] == 251:
        assert time.monotonic() < until, "the read did not begin"


def _settled(worker: Actor) -> dict[str, Any]:
    until = time.monotonic() + TIMEOUT + 15
    while (status := worker.ask("status"))["state"] == "updating":
        assert time.monotonic() < until
    result: dict[str, Any] = status
    return result


def _assert_quiet(worker: Actor, seconds: float) -> None:
    """Fill the model with a pattern and watch that it stays."""
    worker.ask("fill", value=77)
    before, until = worker.ask("digest"), time.monotonic() + seconds
    while time.monotonic() < until:
        assert worker.ask("digest") == before
        time.sleep(0.2)  # others need the processor, too


def _assert_recovers(trainer: Actor, worker: Actor) -> None:
    sent = trainer.ask("send", seed=5, version=5)
    assert worker.ask("digest") == sent["digest"]
    assert worker.ask("status")["version"] == 5


@TRANSPORTS
def test_a_trainer_that_stands_still_is_a_timeout_and_writes_nothing_when_it_goes_on(
    spawn: Spawn, transport: str
) -> None:
    trainer, worker = _pair(spawn, transport)
    agent = _agent(trainer)
    _send_until_half_way(trainer, worker, seed=2, version=2)
    with _stopped(trainer.pid, agent):
        status = _settled(worker)
        assert status["state"] == "failed"
        assert status["version"] is None
        assert "deadline" in status["error"]
        worker.ask("fill", value=77)
        filled = worker.ask("digest")
    assert isinstance(trainer.error(), TransferError)
    assert worker.ask("digest") == filled
    _assert_quiet(worker, 1)
    _assert_recovers(trainer, worker)


def test_an_agent_of_the_trainer_that_stands_still_is_a_timeout(spawn: Spawn) -> None:
    trainer, worker = _pair(spawn, "tcp")
    agent = _agent(trainer)
    _send_until_half_way(trainer, worker, seed=2, version=2)
    os.kill(agent, signal.SIGSTOP)
    since = time.monotonic()
    assert isinstance(trainer.error(), TransferTimeoutError)
    assert time.monotonic() - since < TIMEOUT + 10
    assert not Path(f"/proc/{agent}").exists()  # the abort killed it, stopped as it was
    assert _settled(worker)["version"] is None
    _assert_quiet(worker, 1)
    _assert_recovers(trainer, worker)


@TRANSPORTS
def test_an_agent_of_the_trainer_that_dies_in_a_read_is_a_lost_peer_at_once(spawn: Spawn, transport: str) -> None:
    trainer, worker = _pair(spawn, transport)
    agent = _agent(trainer)
    _send_until_half_way(trainer, worker, seed=2, version=2)
    os.kill(agent, signal.SIGKILL)
    since = time.monotonic()
    if transport == "shm":  # the kernel may have copied all of it already
        with suppress(PeerLostError):
            trainer.reply()
    else:
        assert isinstance(trainer.error(), PeerLostError)
        _assert_quiet(worker, 1)
    assert time.monotonic() - since < TIMEOUT
    _assert_recovers(trainer, worker)


@TRANSPORTS
def test_an_agent_of_the_trainer_that_died_between_two_updates_is_replaced(spawn: Spawn, transport: str) -> None:
    trainer, worker = _pair(spawn, transport)
    before = _agent(trainer)
    os.kill(before, signal.SIGKILL)
    _assert_recovers(trainer, worker)
    assert _agent(trainer) != before


@TRANSPORTS
def test_an_agent_of_the_worker_that_dies_is_named_and_replaced(spawn: Spawn, transport: str) -> None:
    trainer, worker = _pair(spawn, transport)
    os.kill(_agent(worker), signal.SIGKILL)
    trainer.tell("send", seed=2, version=2)
    error = trainer.error()
    assert isinstance(error, TransferError)
    assert error.peer == worker.hello
    assert "agent process ended" in str(error)
    _assert_quiet(worker, 0.5)
    _assert_recovers(trainer, worker)


@TRANSPORTS
def test_a_trainer_that_dies_in_a_read_leaves_no_version_and_quiet_memory(spawn: Spawn, transport: str) -> None:
    trainer, worker = _pair(spawn, transport)
    agent = _agent(trainer)
    _send_until_half_way(trainer, worker, seed=2, version=2)
    trainer.kill()
    status = _settled(worker)
    assert status["version"] is None
    until = time.monotonic() + 10
    while Path(f"/proc/{agent}").exists():  # it went with its engine
        assert time.monotonic() < until
    _assert_quiet(worker, 1)
    successor = spawn("trainer", config=_config(transport), workers=[worker.hello], rows=ROWS)
    _assert_recovers(successor, worker)


@TRANSPORTS
def test_a_worker_that_dies_in_a_read_is_named_and_comes_back(spawn: Spawn, transport: str) -> None:
    trainer, victim = _pair(spawn, transport)
    trainers, workers = _agent(trainer), _agent(victim)
    _send_until_half_way(trainer, victim, seed=2, version=2)
    victim.kill()
    error = trainer.error()
    assert isinstance(error, PeerLostError)
    assert error.peer == victim.hello
    until = time.monotonic() + 10
    while Path(f"/proc/{workers}").exists():
        assert time.monotonic() < until
    port = int(victim.hello.rpartition(":")[2])
    back = spawn("worker", seed=13, config=_config(transport), in_place=True, rows=ROWS, port=port)
    _assert_recovers(trainer, back)
    assert _agent(trainer) != trainers


@TRANSPORTS
def test_a_worker_that_stands_still_is_a_timeout_and_ends_without_a_version(spawn: Spawn, transport: str) -> None:
    trainer, worker = _pair(spawn, transport)
    agent = _agent(worker)
    _send_until_half_way(trainer, worker, seed=2, version=2)
    with _stopped(worker.pid, agent):
        error = trainer.error()
        assert isinstance(error, TransferTimeoutError)
        assert error.peer == worker.hello
    assert _settled(worker)["version"] is None
    _assert_quiet(worker, 1)
    _assert_recovers(trainer, worker)


def test_fifty_updates_leave_no_process_and_no_descriptor_behind(spawn: Spawn) -> None:
    config = _config("shm") | {"timeout": 30}
    worker = spawn("worker", seed=11, config=config, in_place=True)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    for version in range(3):
        trainer.ask("send", seed=version, version=version)

    def held() -> tuple[Any, ...]:
        return trainer.ask("fds"), worker.ask("fds"), _agent(trainer), _agent(worker), trainer.ask("maps")

    before = held()
    for version in range(3, 53):
        sent = trainer.ask("send", seed=version, version=version)
    assert worker.ask("digest") == sent["digest"]
    assert held() == before
