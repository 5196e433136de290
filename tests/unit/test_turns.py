"""Calls to one channel never overlap, abort excepted, though one may outlive its deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from support.models import digest, model
from weight_transfer import TransferError, TransferTimeoutError, WeightReceiver, WeightSender
from weight_transfer.session.calls import Calls
from weight_transfer.session.peers import Peer
from weight_transfer.session.turns import Turns
from weight_transfer.testing.actors import eventually
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.timeout(60)

LOOPBACK: dict[str, Any] = {"backend": "loopback", "timeout": 20, "init_timeout": 20}
METHODS = (
    "status",
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
)


class Channel:
    """In front of a receiver; counts how many calls are in it, and stands still where it is told to."""

    def __init__(self, receiver: WeightReceiver, hangs: str = "") -> None:
        self.receiver, self.hangs = receiver, hangs
        self.model: nn.Linear
        self.release = threading.Event()
        self.inside: list[str] = []
        self.seen: list[list[str]] = []
        self.aborted_during: list[list[str]] = []
        self._lock = threading.Lock()

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        with self._lock:
            self.inside.append(name)
            self.seen.append([*self.inside])
        try:
            if self.hangs == name:
                assert self.release.wait(30)
                self.hangs = ""
                raise OSError("it was too late")
            return call()
        finally:
            with self._lock:
                self.inside.remove(name)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Any:
        return self._call("init_weight_transfer_engine", lambda: self.receiver.init_weight_transfer_engine(init_info))

    def start_weight_update(self, session: str | None = None) -> None:
        self._call("start_weight_update", lambda: self.receiver.start_weight_update(session))

    def update_weights(self, update_info: dict[str, Any]) -> Any:
        return self._call("update_weights", lambda: self.receiver.update_weights(update_info))

    def finish_weight_update(self, weight_version: Any = None, session: str | None = None) -> None:
        self._call("finish_weight_update", lambda: self.receiver.finish_weight_update(weight_version, session))

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        self.aborted_during.append([*self.inside])
        self.receiver.abort_weight_update(reason, session)

    def status(self) -> Any:
        return self._call("status", self.receiver.status)


New = Callable[..., Channel]


@pytest.fixture
def new() -> Iterator[New]:
    channels: list[Channel] = []

    def _new(hangs: str = "", config: dict[str, Any] = LOOPBACK) -> Channel:
        served = model()
        channels.append(Channel(WeightReceiver(config, served), hangs))
        channels[-1].model = served
        return channels[-1]

    yield _new
    for channel in channels:
        channel.release.set()
        channel.receiver.close()


def is_awaited(peer: Peer) -> bool:
    """Whether a call waits for its turn."""
    return bool(peer.turns._changed._waiters)  # type: ignore[attr-defined]


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def give_up_in(sender: WeightSender, channel: Channel, hangs: str) -> None:
    """Have the sender give up an update that stands still in a call to its channel."""
    first, errors = in_background(lambda: sender.send(model(1.0)))
    assert eventually(lambda: channel.inside == [hangs], 20)
    sender._cancel()
    first.join(20)
    assert [isinstance(error, TransferError) for error in errors] == [True]
    assert channel.inside == [hangs]


@pytest.mark.parametrize("hangs", METHODS)
def test_the_next_send_waits_for_a_call_that_was_given_up_and_an_abort_does_not(new: New, hangs: str) -> None:
    channel = new(hangs)
    with WeightSender(LOOPBACK, [channel]) as sender:
        (peer,) = sender._fleet.peers
        give_up_in(sender, channel, hangs)
        assert channel.aborted_during == ([[hangs]] if hangs != "status" else [])
        second, errors = in_background(lambda: sender.send(model(2.0)))
        assert eventually(lambda: is_awaited(peer), 20)
        assert channel.inside == [hangs]
        channel.release.set()
        second.join(20)
        assert not errors
        assert (channel.receiver.version, digest(channel.model)) == (0, digest(model(2.0)))
    assert max(map(len, channel.seen)) == 1


@pytest.mark.parametrize("hangs", METHODS)
def test_a_call_that_never_ends_is_named_by_the_next_one_within_its_deadline(new: New, hangs: str) -> None:
    channel = new(hangs)
    with WeightSender(LOOPBACK, [channel]) as sender:
        give_up_in(sender, channel, hangs)
        sender._fleet._config = attrs.evolve(sender.config, init_timeout=0.2)
        for _ in range(2):
            with pytest.raises(TransferTimeoutError) as caught:
                sender.send(model(2.0))
            assert (
                f"The deadline of 0.2 s passed while waiting for the worker's {hangs} to end, which is still under way "
                "after"
            ) in str(caught.value)
            assert (caught.value.peer, caught.value.phase) == ("worker 0", "init")
        assert channel.inside == [hangs]
    assert max(map(len, channel.seen)) == 1


def test_a_call_that_outlives_its_deadline_is_named_too(new: New) -> None:
    channel = new("status")
    with WeightSender(LOOPBACK | {"init_timeout": 0.2}, [channel]) as sender:
        with pytest.raises(TransferTimeoutError, match="waiting for the worker to answer in phase init"):
            sender.send(model(1.0))
        assert channel.inside == ["status"]
        with pytest.raises(TransferTimeoutError, match="waiting for the worker's status to end"):
            sender.send(model(2.0))


def test_with_continue_nobody_waits_for_the_call_of_another_worker(new: New) -> None:
    config = LOOPBACK | {"backend": "ipc", "on_worker_failure": "continue"}
    good, stuck = new(config=config), new("update_weights", config)
    with WeightSender(config, [good, stuck]) as sender:
        give_up_in(sender, stuck, "update_weights")
        ((peer, error),) = sender.send(model(2.0)).lost
        assert peer == "worker 1"
        assert "The deadline of 1 s passed while waiting for the worker's update_weights to end" in error
        assert (good.receiver.version, digest(good.model)) == (0, digest(model(2.0)))
        stuck.release.set()
        assert eventually(lambda: not stuck.inside, 20)
        assert not sender.send(model(3.0)).lost
        assert [digest(channel.model) for channel in (good, stuck)] == [digest(model(3.0))] * 2
    assert max(map(len, stuck.seen)) == 1


# The turns themselves.


def peers() -> list[Peer]:
    channel: Any = object()
    return [Peer("worker 0", channel, 1)]


def test_a_call_that_waits_for_its_turn_when_the_update_is_given_up_never_begins() -> None:
    (peer,) = one = peers()
    inside, release, called = threading.Event(), threading.Event(), []

    def hang(_peer: Peer) -> None:
        inside.set()
        assert release.wait(20)

    slow = Calls(one, hang, "update_weights", patience=Deadline(20))
    assert inside.wait(20)
    waiting = Calls(one, called.append, "start_weight_update", patience=Deadline(20))
    assert eventually(lambda: is_awaited(peer), 20)
    aborting = Calls(one, called.append, "abort_weight_update")
    assert aborting.wait(Deadline(20)) == {}
    assert called == [peer]
    peer.turns.withdraw()
    (error,) = waiting.wait(Deadline(20)).values()
    assert str(error) == "worker 0: start_weight_update was not called: the update had been given up by then."
    release.set()
    assert slow.wait(Deadline(20)) == {}
    assert called == [peer]


def test_a_call_whose_thread_begins_after_the_update_was_given_up_never_begins() -> None:
    turns = Turns()
    ticket = turns.ticket()
    turns.withdraw()
    with pytest.raises(TransferError, match="was not called"), turns.taken("start_weight_update", ticket, Deadline(20)):
        raise AssertionError
    with turns.taken("start_weight_update", turns.ticket(), Deadline(20)):
        pass


def test_calls_go_on_after_one_that_raised() -> None:
    one = peers()

    def fail(_peer: Peer) -> None:
        raise OSError("no")

    for _ in range(2):
        (error,) = Calls(one, fail, "start_weight_update", patience=Deadline(20)).wait(Deadline(20)).values()
        assert error.cause == "OSError: no"


def test_many_calls_take_turns() -> None:
    one, inside, most = peers(), [], []

    def call(peer: Peer) -> None:
        inside.append(peer)
        most.append(len(inside))
        inside.remove(peer)

    calls = [Calls(one, call, "status", patience=Deadline(20)) for _ in range(50)]
    assert [each.wait(Deadline(20)) for each in calls] == [{}] * 50
    assert most == [1] * 50
