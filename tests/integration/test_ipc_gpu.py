"""The ipc backend on GPUs: the promises of ``test_processes.py``, on CUDA tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import weight_transfer as wt
from support.actors import Actor
from support.models import Odd, digest
from weight_transfer import BackendUnavailableError, HandshakeError, PeerLostError, TransferError, TransferTimeoutError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIRECT: dict[str, Any] = {"backend": "ipc", "timeout": 20, "init_timeout": 30}
RING: dict[str, Any] = DIRECT | {"ipc": {"export": "stage"}, "bucket_bytes": "64KiB"}
ALL = pytest.mark.parametrize("config", [DIRECT, RING], ids=["direct", "ring"])
PEER = pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

Spawn = Callable[..., Actor]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start actors, on the first device unless told otherwise; they end with the test."""
    with ExitStack() as stack:

        def start(role: str, **spec: Any) -> Actor:
            actor = Actor(role, **{"device": "cuda:0", **spec})
            stack.callback(actor.stop)
            return actor.ready()

        yield start


def _settled(worker: Actor) -> dict[str, Any]:
    deadline = time.monotonic() + 40
    while (status := worker.ask("status"))["state"] == "updating":
        assert time.monotonic() < deadline
    result: dict[str, Any] = status
    return result


def _eventually_unmapped(worker: Actor) -> None:
    deadline = time.monotonic() + 10
    while worker.ask("mapped"):
        assert time.monotonic() < deadline


@ALL
@pytest.mark.parametrize("device", ["cuda:0", PEER])
def test_every_bit_arrives_when_weights_go_from_a_to_b_and_back(
    spawn: Spawn, config: dict[str, Any], device: str
) -> None:
    workers = [
        spawn("worker", seed=11, config=config, in_place=True, device=device),
        spawn("worker", seed=12, config=config, in_place=False),
    ]
    trainer = spawn("trainer", config=config, workers=[worker.hello for worker in workers])
    seen = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * 2
        seen.append(sent["digest"])
    assert seen[0] == seen[2] != seen[1]


@ALL
def test_verified_updates_arrive(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"verify": "wire"}
    worker = spawn("worker", seed=11, config=config, in_place=True)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    sent = trainer.ask("send", seed=1, version=1)
    assert worker.ask("digest") == sent["digest"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_side_may_see_its_own_gpu_only(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT, in_place=True, environ={"CUDA_VISIBLE_DEVICES": "1"})
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello], environ={"CUDA_VISIBLE_DEVICES": "0"})
    sent = trainer.ask("send", seed=1, version=1)
    assert worker.ask("digest") == sent["digest"]


def test_memory_that_cuda_cannot_export_goes_through_the_ring(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT, in_place=True)
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello], environ=EXPANDABLE)
    for version, seed in enumerate((1, 2)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert worker.ask("digest") == sent["digest"]
    assert worker.ask("mapped") == 1


def test_memory_that_cuda_cannot_export_is_refused_if_so_configured(spawn: Spawn) -> None:
    config = DIRECT | {"ipc": {"unexportable": "refuse"}}
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello], environ=EXPANDABLE)
    trainer.tell("send", seed=1, version=1)
    error = trainer.error()
    assert isinstance(error, BackendUnavailableError)
    assert "PYTORCH_CUDA_ALLOC_CONF" in error.fix


def test_a_reallocated_parameter_is_exported_anew(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT, in_place=True)
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello])
    for version in range(4):
        sent = trainer.ask("send", seed=version, version=version)
        assert worker.ask("digest") == sent["digest"]
        trainer.ask("reallocate")


def test_a_worker_that_keeps_nothing_mapped_maps_anew_at_each_update(spawn: Spawn) -> None:
    config = DIRECT | {"ipc": {"keep_mapped": False}}
    worker = spawn("worker", seed=11, config=config, in_place=True)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    for version in range(3):
        sent = trainer.ask("send", seed=version, version=version)
        assert worker.ask("digest") == sent["digest"]
        assert worker.ask("mapped") == 0


def test_a_trainer_that_closes_gets_its_memory_back(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT, in_place=True)
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    assert worker.ask("mapped") > 0
    trainer.ask("close")
    assert worker.ask("mapped") == 0
    assert worker.ask("status")["version"] == 1


@ALL
def test_a_killed_worker_is_named_and_comes_back(spawn: Spawn, config: dict[str, Any]) -> None:
    victim = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[victim.hello])
    trainer.ask("send", seed=1, version=1)
    victim.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert victim.reply() == "blocked"
    victim.kill()
    error = trainer.error()
    assert isinstance(error, PeerLostError)
    assert error.peer == victim.hello
    back = spawn("worker", seed=13, config=config, port=int(victim.hello.rpartition(":")[2]))
    sent = trainer.ask("send", seed=3, version=3)
    assert back.ask("digest") == sent["digest"]


@ALL
def test_a_trainer_killed_in_an_update_leaves_no_version_and_a_new_one_takes_over(
    spawn: Spawn, config: dict[str, Any]
) -> None:
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", block_at=1)
    trainer.tell("send", seed=2, version=2)
    assert worker.reply() == "blocked"
    trainer.kill()
    worker.ask("release")
    status = _settled(worker)
    assert status["state"] == "failed"
    assert status["version"] is None
    _eventually_unmapped(worker)
    worker.ask("arm")
    successor = spawn("trainer", config=config, workers=[worker.hello])
    sent = successor.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]


def test_a_trainer_killed_between_updates_frees_what_the_worker_maps(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT, in_place=True)
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    assert worker.ask("mapped") > 0
    trainer.kill()
    _eventually_unmapped(worker)
    assert worker.ask("status")["version"] == 1


@ALL
def test_a_worker_that_hangs_is_a_timeout(spawn: Spawn, config: dict[str, Any]) -> None:
    config = config | {"timeout": 3}
    worker = spawn("worker", seed=11, config=config)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
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


@ALL
def test_nothing_accumulates_over_200_updates(spawn: Spawn, config: dict[str, Any]) -> None:
    worker = spawn("worker", seed=11, config=config, in_place=True)
    trainer = spawn("trainer", config=config, workers=[worker.hello])
    for version in range(5):
        trainer.ask("send", seed=version, version=version)
    baseline = trainer.ask("fds"), worker.ask("fds"), worker.ask("mapped"), worker.ask("free")
    for version in range(5, 205):
        trainer.ask("send", seed=version % 7, version=version)
    assert (trainer.ask("fds"), worker.ask("fds"), worker.ask("mapped"), worker.ask("free")) == baseline


def test_a_side_in_host_memory_and_one_on_a_gpu_do_not_join(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=DIRECT)
    trainer = spawn("trainer", config=DIRECT, workers=[worker.hello], device="cpu")
    trainer.tell("send", seed=1, version=1)
    error = trainer.error()
    assert isinstance(error, HandshakeError)
    assert "host memory" in str(error)


@ALL
def test_a_worker_in_the_trainers_own_process_is_served_too(config: dict[str, Any]) -> None:
    theirs, ours = Odd(seed=1).to("cuda:0"), Odd(seed=2).to("cuda:0")
    with wt.WeightReceiver(config, theirs) as receiver, wt.WeightSender(config, [receiver]) as sender:
        for seed in (1, 2, 1):
            ours.randomise(seed)
            sender.send(ours)
            assert digest(theirs) == digest(ours)


def test_a_failed_loader_leaves_nothing_under_way(spawn: Spawn) -> None:
    worker = spawn("worker", seed=11, config=RING)
    trainer = spawn("trainer", config=RING, workers=[worker.hello])
    trainer.ask("send", seed=1, version=1)
    worker.ask("arm", fail_at=3)
    trainer.tell("send", seed=2, version=2)
    error = trainer.error()
    assert isinstance(error, TransferError)
    assert "the loader was told to fail" in str(error)
    worker.ask("arm")
    sent = trainer.ask("send", seed=3, version=3)
    assert worker.ask("digest") == sent["digest"]
