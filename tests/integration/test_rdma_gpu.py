"""The rdma backend between GPUs: the promises of ``test_processes.py``, on CUDA tensors, over NVLink or RDMA."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from support.actors import Actor
from weight_transfer import HandshakeError, PeerLostError, TransferError, TransferTimeoutError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CONFIG: dict[str, Any] = {"backend": "rdma", "timeout": 20, "init_timeout": 60, "bucket_bytes": "256KiB"}
Spawn = Callable[..., Actor]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start actors, the trainer on the first device and workers on the following ones; they end with the test."""
    with ExitStack() as stack:

        def start(role: str, index: int, **spec: Any) -> Actor:
            actor = Actor(role, device=f"cuda:{index % torch.cuda.device_count()}", **spec)
            stack.callback(actor.stop)
            return actor.ready()

        yield start


def _settled(worker: Actor) -> dict[str, Any]:
    deadline = time.monotonic() + 40
    while (status := worker.ask("status"))["state"] == "updating":
        assert time.monotonic() < deadline
    result: dict[str, Any] = status
    return result


@two_gpus
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
@pytest.mark.parametrize("verify", ["none", "wire"])
def test_every_bit_arrives_on_every_gpu(spawn: Spawn, in_place: bool, verify: str) -> None:
    config = CONFIG | {"verify": verify}
    count = torch.cuda.device_count() - 1
    workers = [spawn("worker", rank, seed=rank, config=config, in_place=in_place) for rank in range(1, count + 1)]
    trainer = spawn("trainer", 0, config=config, workers=[worker.hello for worker in workers])
    seen = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * count
        seen.append(sent["digest"])
        assert {transport.partition(" ")[0] for transport in sent["transports"].values()} <= {"nvlink", "rdma"}
        assert sent["warnings"] == []
    assert seen[0] == seen[2] != seen[1]


@two_gpus
@pytest.mark.parametrize(("link_rate", "slow"), [(1e-3, False), (1e6, True)])
def test_a_link_far_below_its_rate_is_in_the_report(spawn: Spawn, link_rate: float, slow: bool) -> None:
    config = CONFIG | {"rdma": {"link_rate": link_rate}}
    worker = spawn("worker", 1, seed=11, config=config, in_place=True, rows=140_000)  # 72 MB: of less nothing is said
    trainer = spawn("trainer", 0, config=config, workers=[worker.hello], rows=140_000)
    sent = trainer.ask("send", seed=1, version=1)
    assert worker.ask("digest") == sent["digest"]
    assert ["less than half" in warning for warning in sent["warnings"]] == [True] * slow


@two_gpus
def test_a_killed_worker_is_named_and_comes_back(spawn: Spawn) -> None:
    victim = spawn("worker", 1, seed=11, config=CONFIG)
    trainer = spawn("trainer", 0, config=CONFIG, workers=[victim.hello])
    trainer.ask("send", seed=1, version=1)
    victim.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert victim.reply() == "blocked"
    victim.kill()
    error = trainer.error()
    assert isinstance(error, PeerLostError)
    assert error.peer == victim.hello
    back = spawn("worker", 1, seed=13, config=CONFIG, port=int(victim.hello.rpartition(":")[2]))
    sent = trainer.ask("send", seed=3, version=3)
    assert back.ask("digest") == sent["digest"]


@two_gpus
def test_a_trainer_that_dies_leaves_no_version_and_another_one_takes_over(spawn: Spawn) -> None:
    config = CONFIG | {"timeout": 5}
    worker = spawn("worker", 1, seed=11, config=config)
    trainer = spawn("trainer", 0, config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=2)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    trainer.kill()
    worker.ask("release")
    assert _settled(worker)["version"] is None
    worker.ask("arm")
    successor = spawn("trainer", 0, config=config, workers=[worker.hello])
    sent = successor.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]


@two_gpus
def test_a_trainer_that_stops_is_a_timeout_and_writes_nothing_when_it_wakes_up(spawn: Spawn) -> None:
    config = CONFIG | {"timeout": 5}
    worker = spawn("worker", 1, seed=11, config=config)
    trainer = spawn("trainer", 0, config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=2)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    with trainer.stopped():
        worker.ask("release")
        assert _settled(worker)["version"] is None
        quiet = worker.ask("digest")
    assert isinstance(trainer.error(), TransferError)
    assert worker.ask("digest") == quiet
    worker.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]


@two_gpus
def test_a_worker_that_hangs_is_a_timeout(spawn: Spawn) -> None:
    config = CONFIG | {"timeout": 3}
    worker = spawn("worker", 1, seed=11, config=config)
    trainer = spawn("trainer", 0, config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    assert isinstance(trainer.error(), TransferTimeoutError)
    worker.ask("release")
    assert _settled(worker)["version"] is None
    worker.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]


def test_on_one_gpu_the_bits_arrive_or_the_reason_and_the_way_out_are_named(spawn: Spawn) -> None:
    """Where UCX reads within one GPU depends on the machine; where it cannot, nothing may crawl over TCP in silence."""
    worker = spawn("worker", 0, seed=11, config=CONFIG, in_place=True)
    trainer = spawn("trainer", 0, config=CONFIG, workers=[worker.hello])
    try:
        sent = trainer.ask("send", seed=1, version=1)
    except HandshakeError as error:
        reason = str(error)
    else:
        assert worker.ask("digest") == sent["digest"]
        return
    assert "ipc backend" in reason
    assert worker.ask("status")["version"] is None
