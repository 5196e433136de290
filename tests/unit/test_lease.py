"""Whose the workers are: a newer lease takes them over, and no older one comes back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.models import LOOPBACK, digest, model
from support.scripted import INIT, Worker
from weight_transfer import (
    ConfigError,
    LocalChannel,
    ParallelConfig,
    ReceiverState,
    ReplacedError,
    SessionError,
    WeightReceiver,
    WeightSender,
    WeightTransferError,
)
from weight_transfer.values.lease import Lease, session_of

pytestmark = pytest.mark.timeout(60)


def joins(worker: Worker, number: int, holder: str, join: int = 1) -> str:
    """Join as a trainer with a lease; return the session."""
    session = session_of(holder, join)
    lease = {"number": number, "holder": holder}
    worker.receiver.init_weight_transfer_engine(INIT | {"session": session, "lease": lease})
    return session


CALLS: dict[str, Callable[[WeightReceiver, str], object]] = {
    "start_weight_update": lambda receiver, session: receiver.start_weight_update(session),
    "update_weights": lambda receiver, session: receiver.update_weights({"timeout": 1, "session": session}),
    "finish_weight_update": lambda receiver, session: receiver.finish_weight_update(None, session, "an update"),
    "abort_weight_update": lambda receiver, session: receiver.abort_weight_update("never mind", session),
    "weight_needs": lambda receiver, session: receiver.weight_needs({"session": session}),
}


def test_a_lease_is_newer_than_all_that_are_known_and_than_those_of_workers_that_have_forgotten() -> None:
    now = time.time_ns() // 1000
    assert now <= Lease.after([], "a").number <= now + 5_000_000
    future = now + 3_600_000_000
    assert Lease.after([None, Lease(future, "b"), Lease(3, "c")], "a") == Lease(future + 1, "a")
    assert Lease(8, "z") < Lease(9, "a") < Lease(9, "b")


@pytest.mark.parametrize(
    "told", [None, 7, {}, {"number": 1}, {"number": True, "holder": "x"}, {"number": -1, "holder": "x"}, []]
)
def test_what_is_no_lease_counts_as_none(told: object) -> None:
    assert Lease.told({"lease": told}) is None
    assert Lease.told({}) is None


@pytest.mark.parametrize(
    "lease", [7, {"number": 2**62, "holder": "x"}, {"number": 7}, {"number": 8, "holder": "x" * 65}]
)
def test_an_init_with_a_wrong_lease_is_a_sentence_and_changes_nothing(worker: Worker, lease: object) -> None:
    session = joins(worker, 7, "first")
    with pytest.raises(ConfigError, match="init_info: lease"):
        worker.receiver.init_weight_transfer_engine(INIT | {"session": "other", "lease": lease})
    worker.receiver.start_weight_update(session)


@pytest.mark.parametrize("method", CALLS)
def test_every_call_of_a_trainer_that_was_replaced_is_refused_for_good(worker: Worker, method: str) -> None:
    stale = joins(worker, 7, "first")
    joins(worker, 8, "second")
    before = worker.receiver.status()
    with pytest.raises(ReplacedError, match=rf"{method} is refused: another trainer \(lease 8\) has taken") as caught:
        CALLS[method](worker.receiver, stale)
    assert (caught.value.lease, caught.value.method) == (8, method)
    assert worker.receiver.status() == before


@pytest.mark.parametrize(("number", "holder"), [(7, "first"), (8, "a"), (7, "z")])
def test_an_older_lease_cannot_join_again(worker: Worker, number: int, holder: str) -> None:
    joins(worker, 8, "second")
    with pytest.raises(ReplacedError, match=rf"has taken this worker over from this one \(lease {number}\)"):
        joins(worker, number, holder)
    assert worker.receiver.status()["lease"] == {"number": 8, "holder": "second"}


def test_a_late_call_of_the_trainers_own_earlier_join_is_refused_as_ever(worker: Worker) -> None:
    late = joins(worker, 8, "mine", 1)
    session = joins(worker, 8, "mine", 2)
    with pytest.raises(SessionError) as caught:
        worker.receiver.start_weight_update(late)
    assert type(caught.value) is SessionError
    worker.receiver.start_weight_update(session)


def test_whoever_names_no_lease_joins_as_ever_and_the_lease_is_kept(worker: Worker) -> None:
    mine = joins(worker, 8, "mine")
    worker.init()
    worker.deliver(1.0, 1)
    assert worker.receiver.version == 1
    with pytest.raises(SessionError) as caught:
        worker.receiver.start_weight_update(mine)
    assert type(caught.value) is SessionError  # it may join again
    with pytest.raises(ReplacedError):
        joins(worker, 7, "stale")
    joins(worker, 8, "mine", 2)


@pytest.mark.parametrize("at", ["init", "update"])
def test_what_is_under_way_of_a_trainer_ends_at_once_when_a_newer_one_comes(worker: Worker, at: str) -> None:
    inside = threading.Event()
    errors: list[WeightTransferError] = []

    def blocks(*_: object) -> None:
        worker.script.join = lambda _info: None
        inside.set()
        assert worker.engine.aborted.wait(20)
        raise OSError("interrupted")

    def stale() -> None:
        try:
            session = joins(worker, 7, "first")
            worker.receiver.start_weight_update(session)
            worker.update(1.0, 1, session=session)
        except WeightTransferError as error:
            errors.append(error)

    setattr(worker.script, "join" if at == "init" else "receive", blocks)
    thread = threading.Thread(target=stale)
    thread.start()
    assert inside.wait(20)
    worker.script.receive = worker.script.load_all
    since = time.monotonic()
    session = joins(worker, 8, "second")
    thread.join(20)
    assert time.monotonic() - since < 5
    assert [type(error) for error in errors] == [ReplacedError]
    worker.receiver.start_weight_update(session)
    worker.update(2.0, 2, session=session)
    worker.receiver.finish_weight_update(2, session)
    assert (worker.receiver.version, worker.model.values) == (2, [2.0] * 3)


# Senders.


@pytest.mark.parametrize("config", [LOOPBACK, LOOPBACK | {"on_worker_failure": "continue"}], ids=["abort", "continue"])
def test_of_senders_that_begin_at_the_same_time_one_holds_all_workers(closing: Any, config: dict[str, Any]) -> None:
    models = [model() for _ in range(3)]
    receivers = [closing(WeightReceiver(config, own)) for own in models]
    for round_ in range(5):
        senders = [closing(WeightSender(config, order)) for order in itertools.permutations(receivers, 3)]
        begin = threading.Barrier(len(senders))
        outcomes: dict[WeightSender, object] = {}

        def send(sender: WeightSender, value: float) -> None:
            begin.wait(20)  # noqa: B023  (of this round)
            try:
                outcomes[sender] = sender.send(model(value), version=round_)  # noqa: B023
            except WeightTransferError as error:
                outcomes[sender] = error  # noqa: B023

        threads = [
            threading.Thread(target=send, args=(sender, 10.0 * round_ + index)) for index, sender in enumerate(senders)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        holders = {str(receiver.status()["lease"]) for receiver in receivers}
        assert len(holders) == 1
        tries = {sender: _can_send(sender, round_) for sender in senders}
        assert sum(tries.values()) == 1, outcomes
        assert len({digest(own) for own in models}) == 1
        for sender in senders:
            sender.close()


def _can_send(sender: WeightSender, version: int) -> bool:
    try:
        sender.send(model(1.0), version=version)
    except ReplacedError:
        return False
    return True


def test_a_stale_trainer_does_not_join_a_worker_that_was_started_anew_if_another_one_was_not(closing: Any) -> None:
    kept = closing(WeightReceiver(LOOPBACK, model()))
    restarted = LocalChannel(closing(WeightReceiver(LOOPBACK, model())))
    stale, successor = (closing(WeightSender(LOOPBACK, [kept, restarted])) for _ in range(2))
    stale.send(model(1.0), version=1)
    successor.send(model(2.0), version=2)
    restarted._receivers = (closing(WeightReceiver(LOOPBACK, model())),)
    with pytest.raises(ReplacedError):  # by the one that knows
        stale.send(model(3.0), version=3)
    with pytest.raises(ReplacedError):
        stale.send(model(3.0), version=4)
    assert restarted.status()["lease"] is None
    assert successor.send(model(4.0)).version == 3


def test_a_stale_trainer_is_older_than_a_new_one_though_all_workers_were_started_anew(
    closing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = LocalChannel(closing(WeightReceiver(LOOPBACK, model())))
    stale = closing(WeightSender(LOOPBACK, [channel]))
    stale.send(model(1.0), version=1)
    channel._receivers = (closing(WeightReceiver(LOOPBACK, model())),)
    later = time.time_ns() + 60_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    successor = closing(WeightSender(LOOPBACK, [channel]))
    successor.send(model(2.0), version=2)
    with pytest.raises(ReplacedError):
        stale.send(model(3.0), version=3)


def test_a_worker_of_a_newer_trainer_can_be_added_and_is_taken_over(closing: Any) -> None:
    own, added = (closing(WeightReceiver(LOOPBACK, model())) for _ in range(2))
    sender = closing(WeightSender(LOOPBACK, [own]))
    sender.send(model(1.0), version=1)
    other = closing(WeightSender(LOOPBACK, [added]))
    other.send(model(1.0), version=1)
    sender.add_worker(added)
    assert sender.send(model(2.0)).workers == ("worker 0", "worker 1")
    assert own.status()["lease"] == added.status()["lease"]
    with pytest.raises(ReplacedError):
        other.send(model(3.0))
    assert sender.send(model(4.0)).version == 3


def test_a_worker_that_nobody_newer_has_used_is_added_without_a_new_lease(closing: Any) -> None:
    own, added = (closing(WeightReceiver(LOOPBACK, model())) for _ in range(2))
    sender = closing(WeightSender(LOOPBACK, [own]))
    sender.send(model(1.0))
    lease = own.status()["lease"]
    sender.add_worker(added)
    sender.send(model(2.0))
    assert own.status()["lease"] == added.status()["lease"] == lease


def test_a_replica_tells_the_newest_lease_of_its_workers(closing: Any) -> None:
    receivers = [
        closing(WeightReceiver(LOOPBACK, model(), parallel_config=ParallelConfig(rank=rank, world_size=2)))
        for rank in (0, 1)
    ]
    channel = LocalChannel(*receivers)
    receivers[1]._lifecycle.hand_to("x.1", Lease(2**60, "x"))
    assert channel.status()["lease"] == {"number": 2**60, "holder": "x"}
    closing(WeightSender(LOOPBACK, [channel])).send(model(1.0), version=1)
    assert [receiver.status()["lease"]["number"] for receiver in receivers] == [2**60 + 1] * 2


class Old(LocalChannel):
    """A worker whose status says nothing of leases."""

    def __init__(self, receiver: WeightReceiver) -> None:
        super().__init__(receiver)
        self.infos: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        self.infos.append(init_info)
        return super().init_weight_transfer_engine(init_info)

    def status(self) -> dict[str, Any]:
        return {name: value for name, value in super().status().items() if name != "lease"}


def test_a_worker_that_knows_no_leases_is_told_of_none_and_goes_by_turns(closing: Any) -> None:
    served = model()
    channel = Old(closing(WeightReceiver(LOOPBACK, served)))
    first, second = (closing(WeightSender(LOOPBACK, [channel])) for _ in range(2))
    for version, (sender, value) in enumerate([(first, 1.0), (second, 2.0), (first, 1.0), (second, 2.0)]):
        sender.send(model(value), version=version)
        assert digest(served) == digest(model(value))
    assert [("lease" in info) for info in channel.infos] == [False] * 4


def test_a_sender_that_was_replaced_while_a_worker_stood_still_says_so_and_not_that_it_was_late(closing: Any) -> None:
    receivers = [closing(WeightReceiver(LOOPBACK, model())) for _ in range(2)]

    class Slow(LocalChannel):
        def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
            closing(WeightSender(LOOPBACK, receivers)).send(model(2.0), version=2)
            replaced.set()
            late.wait(20)
            return super().update_weights(update_info)

    replaced, late = threading.Event(), threading.Event()
    config = LOOPBACK | {"timeout": 1.5}
    sender = closing(WeightSender(config, [Slow(receivers[0]), receivers[1]]))
    with pytest.raises(ReplacedError):
        sender.send(model(1.0), version=1)
    assert replaced.wait(20)
    late.set()
    assert [(receiver.state, receiver.version) for receiver in receivers] == [(ReceiverState.READY, 2)] * 2
