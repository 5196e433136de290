"""Weights reach actors on a cluster of three nodes, whatever these are doing, and whichever of them dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs Ray; `make test-ray` installs it")

from actors import AsyncWorker, Restarting, Worker, bits, make_model  # noqa: E402  (they need Ray)

import weight_transfer as wt  # noqa: E402
from weight_transfer_ray import RayChannel  # noqa: E402

A, B = make_model(1), make_model(2)
SECONDS = 60


def config(backend: str = "ipc", **settings: Any) -> dict[str, Any]:
    return {"backend": backend, "timeout": 30, "init_timeout": SECONDS, **settings}


def ask(call: Any) -> Any:
    return ray.get(call, timeout=SECONDS)


def in_background(call: Any, *arguments: Any) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call(*arguments)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("backend", ["ipc", "nccl", "rdma"])
def test_actors_receive_every_bit_while_they_are_busy(backend: str, place: Any) -> None:
    plain, asynchronous = place(Worker, "n1", config(backend)), place(AsyncWorker, "n2", config(backend))
    channels = [RayChannel(plain), RayChannel(asynchronous, name="the other")]
    with wt.WeightSender(config(backend), channels) as sender:
        for version, model in enumerate([A, B, A], start=1):
            busy = plain.hold.remote()
            report = sender.send(model, version)
            (one,), (other,) = report.receipts.values()
            assert one.digest == other.digest != "", "bytes are compared by default"
            assert not ray.wait([busy], timeout=0)[0], "the actor's own method has ended, so it was not busy"
            ask(plain.let_go.options(concurrency_group="weight_transfer_interrupts").remote())
            assert ask(busy) == version
            for actor in (plain, asynchronous):
                assert ask(actor.bits.remote()) == (version, bits(model))
        assert ask(asynchronous.sample.remote()) == 3


def test_an_error_arrives_as_what_it_is(place: Any) -> None:
    actor = place(Worker, "n1", config())
    with wt.WeightSender(config(), [RayChannel(actor)]) as sender:
        sender.send(A)
        ask(actor.make_trouble.remote("broken"))
        with pytest.raises(wt.TransferError, match="this loader is broken"):
            sender.send(B)
        ask(actor.make_trouble.remote(""))
        sender.send(A)
        assert ask(actor.bits.remote())[1] == bits(A)
    with (
        wt.WeightSender({"backend": "nccl", "init_timeout": 30}, [RayChannel(actor)]) as other,
        pytest.raises(wt.HandshakeError, match="'ipc', the trainer 'nccl'"),
    ):
        other.send(A)


def test_an_abort_reaches_an_actor_in_the_middle_of_an_update(place: Any) -> None:
    actor = place(Worker, "n1", config())
    with wt.WeightSender(config(timeout=2), [channel := RayChannel(actor, name="slow")]) as sender:
        sender.send(A)
        ask(actor.make_trouble.remote("slow"))
        sending, raised = in_background(sender.send, B)
        assert ask(actor.await_loading.remote())
        assert channel.status()["state"] == "updating"
        sending.join(10)
        assert isinstance(raised[0], wt.TransferTimeoutError) and raised[0].peer == "slow"
        ask(actor.let_go.remote())
        ask(actor.make_trouble.remote(""))
        assert "deadline" in channel.status()["error"], "the actor was told why it gave up"
        sender.send(B)
        assert ask(actor.bits.remote())[1] == bits(B)


def test_an_actor_that_was_killed_in_a_send_is_named_and_joins_again(place: Any) -> None:
    actor = place(Restarting, "n1", config())
    with wt.WeightSender(config(), [RayChannel(actor, name="victim")]) as sender:
        sender.send(A)
        ask(actor.make_trouble.remote("slow"))
        process = ask(actor.pid.remote())
        sending, raised = in_background(sender.send, B)
        assert ask(actor.await_loading.remote())
        os.kill(process, signal.SIGKILL)
        sending.join(20)
        assert isinstance(raised[0], wt.PeerLostError)
        assert raised[0].peer == "victim" and f"process {process}" in str(raised[0])
        sender.send(B)
        assert ask(actor.pid.remote()) != process
        assert ask(actor.bits.remote())[1] == bits(B)


def test_an_actor_that_is_gone_for_good_is_told_at_once(place: Any) -> None:
    actor = place(Worker, "n1", config())
    with wt.WeightSender(config(), [RayChannel(actor)]) as sender:
        sender.send(A)
        os.kill(ask(actor.pid.remote()), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(wt.PeerLostError, match="has died") as caught:
            sender.send(B)
        assert caught.value.permanent and time.monotonic() - began < 10


def test_the_run_goes_on_without_a_node_and_takes_it_in_again(nodes: Any, place: Any) -> None:
    settings = config(on_worker_failure="continue")
    stays, goes = place(Worker, "n1", settings), place(Restarting, "n2", settings)
    with wt.WeightSender(settings, [RayChannel(stays), RayChannel(goes, name="goes")]) as sender:
        assert sender.send(A).lost == ()
        ask(goes.make_trouble.remote("slow"))
        sending, raised = in_background(sender.send, B)
        assert ask(goes.await_loading.remote())
        nodes.kill("n2")
        sending.join(SECONDS)
        assert not raised and not sending.is_alive()
        assert ask(stays.bits.remote())[1] == bits(B)
        newcomer = place(Worker, "head", settings)
        sender.add_worker(RayChannel(newcomer))
        nodes.bring_back("n2")
        until = time.monotonic() + SECONDS
        while sender.send(A).lost:
            assert time.monotonic() < until, "the actor has not come back"
        for actor in (stays, goes, newcomer):
            assert ask(actor.bits.remote())[1] == bits(A)


def test_actors_of_one_replica_are_one_worker(place: Any) -> None:
    ranks = [place(Worker, "head", config(), 64, {"rank": rank, "world_size": 2}) for rank in range(2)]
    channel = RayChannel(*ranks, name="replica")
    with wt.WeightSender(config(), [channel]) as sender:
        sender.send(A)
        assert channel.status()["workers"] == 2
        ask(ranks[1].make_trouble.remote("broken"))
        with pytest.raises(wt.TransferError, match=r"replica.*this loader is broken"):
            sender.send(B)
        ask(ranks[1].make_trouble.remote(""))
        sender.send(A)
        assert [ask(rank.bits.remote())[1] for rank in ranks] == [bits(A)] * 2


def test_what_is_no_worker_is_refused() -> None:
    with pytest.raises(wt.ConfigError, match="at least one"):
        RayChannel()
    with pytest.raises(wt.ConfigError, match="no handle of a RayWorker"):
        RayChannel(object())
