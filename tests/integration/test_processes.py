"""Promises beyond the conformance kit, between real processes; and rdma over TCP, which no kit of its own runs."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from weight_transfer import PeerLostError, TransferError, TransferTimeoutError
from weight_transfer.testing.resources import abandoned

if TYPE_CHECKING:
    from support.actors import Spawn

ADOPT: dict[str, Any] = {"backend": "ipc", "timeout": 30, "init_timeout": 20}
STAGE: dict[str, Any] = ADOPT | {"ipc": {"export": "stage"}, "bucket_bytes": "64KiB"}
NCCL: dict[str, Any] = ADOPT | {"backend": "nccl", "nccl": {"direct_bytes": "96KiB"}, "bucket_bytes": "256KiB"}
TCP: dict[str, Any] = ADOPT | {
    "backend": "rdma",
    "rdma": {"transport": "tcp", "adopt": False},
    "bucket_bytes": "64KiB",
}
ALL = pytest.mark.parametrize("config", [ADOPT, STAGE, NCCL, TCP], ids=["ipc", "ipc, staged", "nccl", "rdma, tcp"])
NOT_IN_A_KIT = pytest.mark.parametrize("config", [TCP], ids=["rdma, tcp"])


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("verify", ["none", "wire"])
@NOT_IN_A_KIT
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
def test_every_bit_arrives_when_weights_go_from_a_to_b_and_back(
    spawn: Spawn, config: dict[str, Any], verify: str, in_place: bool
) -> None:
    config = config | {"verify": verify}
    workers = [spawn("worker", seed=seed, config=config, in_place=in_place) for seed in (11, 12)]
    trainer = spawn("trainer", config=config, workers=[worker.hello for worker in workers])
    seen = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * 2
        assert [worker.ask("status")["version"] for worker in workers] == [version] * 2
        seen.append(sent["digest"])
    assert seen[0] == seen[2] != seen[1]


@NOT_IN_A_KIT
def test_a_worker_killed_in_an_update_is_named_at_once_and_rejoins_after_a_restart(
    spawn: Spawn, config: dict[str, Any]
) -> None:
    victim, survivor = (spawn("worker", seed=seed, config=config) for seed in (11, 12))
    trainer = spawn("trainer", config=config, workers=[victim.hello, survivor.hello])
    trainer.ask("send", seed=1, version=1)
    victim.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert victim.reply() == "blocked"
    since = time.monotonic()
    victim.kill()
    error = trainer.error()
    assert isinstance(error, PeerLostError)
    assert error.peer == victim.hello
    assert error.version == 2
    assert time.monotonic() - since < 15
    assert survivor.ask("status")["version"] is None
    spawn("worker", seed=13, config=config, port=_port(victim.hello))
    sent = trainer.ask("send", seed=3, version=3)
    assert survivor.ask("digest") == sent["digest"]
    assert sent["workers"] == [victim.hello, survivor.hello]


@ALL
def test_replicas_of_several_workers_stand_beside_single_ones(spawn: Spawn, config: dict[str, Any]) -> None:
    replicas = [spawn("worker", seed=11 * index, config=config, replica=index) for index in (1, 2)]
    trainer = spawn("trainer", config=config, workers=[replica.hello for replica in replicas])
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        digests = [digest for replica in replicas for digest in replica.ask("digests")]
        assert digests == [sent["digest"]] * 3
        assert [replica.ask("status")["version"] for replica in replicas] == [version] * 2


@ALL
def test_a_new_worker_joins_at_the_next_update_and_one_may_leave(spawn: Spawn, config: dict[str, Any]) -> None:
    first, second = (spawn("worker", seed=seed, config=config) for seed in (11, 12))
    trainer = spawn("trainer", config=config, workers=[first.hello])
    trainer.ask("send", seed=1, version=1)
    trainer.ask("add_worker", worker=second.hello)
    sent = trainer.ask("send", seed=2, version=2)
    assert [worker.ask("digest") for worker in (first, second)] == [sent["digest"]] * 2
    left = sent["digest"]
    trainer.ask("remove_worker", worker=first.hello)
    sent = trainer.ask("send", seed=3, version=3)
    assert sent["workers"] == [second.hello]
    assert second.ask("digest") == sent["digest"]
    assert first.ask("digest") == left
    assert first.ask("status")["version"] == 2


@NOT_IN_A_KIT
def test_with_continue_the_others_publish_when_a_worker_dies(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"on_worker_failure": "continue"}
    victim, survivor = (spawn("worker", seed=seed, config=config) for seed in (11, 12))
    trainer = spawn("trainer", config=config, workers=[victim.hello, survivor.hello])
    trainer.ask("send", seed=1, version=1)
    victim.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert victim.reply() == "blocked"
    victim.kill()
    sent = trainer.reply()
    assert [peer for peer, _ in sent["lost"]] == [victim.hello]
    assert survivor.ask("digest") == sent["digest"]
    assert survivor.ask("status")["version"] == 2
    back = spawn("worker", seed=13, config=config, port=_port(victim.hello))
    sent = trainer.ask("send", seed=3, version=3)
    assert sent["lost"] == []
    assert [worker.ask("digest") for worker in (back, survivor)] == [sent["digest"]] * 2


def test_with_continue_a_worker_that_cannot_join_does_not_hold_the_others_up(spawn: Spawn) -> None:
    config = ADOPT | {"on_worker_failure": "continue", "init_timeout": 60}
    survivor = spawn("worker", seed=12, config=config)
    broken = spawn("worker", seed=11, config=config, breaks_at_init=True)
    trainer = spawn("trainer", config=config, workers=[survivor.hello, broken.hello])
    trainer.tell("send", seed=1, version=1)
    sent = trainer.reply()
    assert broken.hello in [peer for peer, _ in sent["lost"]]
    sent = trainer.ask("send", seed=2, version=2)
    assert survivor.ask("digest") == sent["digest"]
    assert survivor.ask("status")["version"] == 2


@NOT_IN_A_KIT
def test_a_trainer_killed_in_an_update_leaves_no_version_and_a_new_one_takes_over(
    spawn: Spawn, config: dict[str, Any]
) -> None:
    config = config | {"timeout": 3}
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=2 if config in (STAGE, TCP) else 1)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    trainer.kill()
    worker.ask("release")
    deadline = time.monotonic() + 15
    while (status := worker.ask("status"))["state"] == "updating":
        assert time.monotonic() < deadline
    assert status["state"] == "failed"
    assert status["version"] is None
    assert status["error"]
    successor = spawn("trainer", config=config, workers=[worker.hello])
    sent = successor.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]
    assert worker.ask("status")["version"] == 3


@NOT_IN_A_KIT
def test_a_worker_that_hangs_is_a_timeout_and_writes_nothing_afterwards(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"timeout": 2}
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=1)
    since = time.monotonic()
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    error = trainer.error()
    assert isinstance(error, TransferTimeoutError)
    assert error.peer is not None
    assert time.monotonic() - since < 2 + 10 + 5  # the update's deadline, the abort's, and a margin
    worker.ask("release")
    deadline = time.monotonic() + 15
    while worker.ask("status")["state"] == "updating":
        assert time.monotonic() < deadline
    assert worker.ask("status")["version"] is None
    assert worker.ask("calls") == 1  # the call that was under way could end, no other one began
    worker.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]


@NOT_IN_A_KIT
def test_after_a_timeout_a_trainer_that_wakes_up_writes_nothing_any_more(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"timeout": 3}
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=2)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    with trainer.stopped():
        worker.ask("release")
        deadline = time.monotonic() + 20
        while (status := worker.ask("status"))["state"] == "updating":
            assert time.monotonic() < deadline
        assert status["state"] == "failed"
        assert status["version"] is None
        quiet = worker.ask("digest")
    assert isinstance(trainer.error(), TransferError)
    assert worker.ask("digest") == quiet
    worker.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"] != quiet


@NOT_IN_A_KIT
def test_nothing_accumulates_over_many_updates_and_nothing_is_left_behind(spawn: Spawn, config: dict[str, Any]) -> None:
    before = abandoned()
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    for version in range(3):
        trainer.ask("send", seed=version, version=version)
    baseline = (trainer.ask("fds"), trainer.ask("maps"), worker.ask("maps"))
    for version in range(3, 30):
        trainer.ask("send", seed=version, version=version)
    assert (trainer.ask("fds"), trainer.ask("maps"), worker.ask("maps")) == baseline
    trainer.kill()
    assert abandoned() == before  # shared memory without a name: nothing to unlink, even after SIGKILL


def test_a_second_update_sends_less_than_4_kb_of_control_traffic_whatever_the_number_of_parameters(
    spawn: Spawn,
) -> None:
    """Counted on the wire, both directions, headers included, for one worker."""
    worker = spawn("worker", seed=11, config=ADOPT)
    with CountingProxy(_port(worker.hello)) as proxy:
        trainer = spawn("trainer", config=ADOPT, workers=[proxy.url])
        trainer.ask("send", seed=1, version=1)
        first = proxy.nbytes
        sent = trainer.ask("send", seed=2, version=2)
        assert 0 < proxy.nbytes - first < 4096
        assert worker.ask("digest") == sent["digest"]


class CountingProxy:
    """A TCP proxy that counts what passes."""

    def __init__(self, port: int) -> None:
        self.nbytes = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._relay, args=(client, server), daemon=True).start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # one end was closed at once
            while data := source.recv(65536):
                self.nbytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
