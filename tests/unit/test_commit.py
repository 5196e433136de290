"""A version is published update by update, forward, and by all who can; who cannot is named."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from support.models import CONTINUE, LOOPBACK, digest, model
from support.scripted import INIT, Worker, breaks
from weight_transfer import (
    CommitError,
    LocalChannel,
    MembershipChanged,
    PeerLostError,
    ReceiverState,
    RollbackError,
    StaleCommitError,
    TransferError,
    WeightReceiver,
    WeightSender,
    hookimpl,
)

pytestmark = pytest.mark.timeout(60)


# The id of what is published.


def test_the_status_tells_what_has_arrived_and_what_is_published(worker: Worker) -> None:
    worker.receiver.init_weight_transfer_engine(INIT)
    worker.start()
    worker.update(1.0, 7, update="a")
    status = worker.receiver.status()
    assert status["prepared"] == {"target": "model", "version": 7, "update": "a"}
    assert (status["state"], status["version"], status["committed"]) == ("updating", None, {})
    worker.receiver.finish_weight_update(7, None, "a")
    status = worker.receiver.status()
    assert (status["prepared"], status["updates"], status["committed"]) == (None, {"model": "a"}, {"model": 7})
    worker.start()
    worker.update(2.0, 8, update="b")
    worker.receiver.abort_weight_update("the trainer died")
    status = worker.receiver.status()
    assert (status["state"], status["version"], status["versions"]) == ("failed", None, {"model": None})
    assert (status["prepared"], status["updates"], status["committed"]) == (None, {}, {"model": 7})
    assert status["error"] == "the trainer died (version 8 had arrived, and was not published)"


def test_a_commit_of_another_update_is_refused_and_changes_nothing(worker: Worker) -> None:
    worker.init()
    with pytest.raises(StaleCommitError, match="of update 'a' is refused: no update waits for that here"):
        worker.receiver.finish_weight_update(1, None, "a")
    worker.start()
    with pytest.raises(StaleCommitError, match="no update waits for that here"):
        worker.receiver.finish_weight_update(1, None, "a")
    worker.update(1.0, 1, update="a")
    with pytest.raises(StaleCommitError, match="of update 'b' is refused: update 'a' has arrived here") as caught:
        worker.receiver.finish_weight_update(1, None, "b")
    assert (caught.value.update, caught.value.state, worker.receiver.version) == ("b", "updating", None)
    worker.receiver.finish_weight_update(1, None, "a")
    with pytest.raises(StaleCommitError, match="no update waits for that here"):  # the same call again
        worker.receiver.finish_weight_update(1, None, "a")
    worker.start()
    worker.update(2.0, 2, update="c")
    with pytest.raises(StaleCommitError, match="update 'c' has arrived here"):  # and in the next update
        worker.receiver.finish_weight_update(None, None, "a")
    worker.receiver.finish_weight_update(2)  # who knows no ids publishes as ever
    assert (worker.receiver.version, worker.model.values) == (2, [2.0] * 3)


def test_a_sender_names_the_update_that_it_publishes(closing: Any) -> None:
    class Recording(LocalChannel):
        def finish_weight_update(
            self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
        ) -> None:
            named.append(update)
            super().finish_weight_update(weight_version, session, update)

    named: list[str | None] = []
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    sender = closing(WeightSender(LOOPBACK, [Recording(receiver)]))
    for value in (1.0, 2.0):
        sender.send(model(value))
        assert named[-1] == receiver.status()["updates"]["model"]
    assert len(set(named)) == 2


# Backwards.


def test_a_lower_number_is_refused_before_anything_is_changed(worker: Worker) -> None:
    worker.init()
    worker.deliver(7.0, 7)
    worker.start()
    with pytest.raises(RollbackError, match="Version 6 is older than 7, which this worker has published") as caught:
        worker.update(6.0, 6)
    assert (caught.value.version, caught.value.published) == (6, 7)
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, 7)
    assert worker.model.values == [7.0] * 3
    worker.deliver(8.0, 7)  # equal: the same once more
    worker.start()
    worker.update(6.0, 6, allow_rollback=True)
    worker.finish(6)
    assert (worker.receiver.version, worker.model.values) == (6, [6.0] * 3)
    worker.deliver(1.0, "first")
    worker.deliver(2.0, 1)  # a name is neither older nor newer
    assert worker.receiver.version == 1


def test_what_was_published_before_a_failure_still_counts(worker: Worker) -> None:
    worker.init()
    worker.deliver(7.0, 7)
    worker.start()
    breaks(worker, 1)
    with pytest.raises(TransferError):
        worker.update(8.0, 8)
    assert worker.receiver.failed
    worker.init()
    worker.start()
    with pytest.raises(RollbackError):
        worker.update(6.0, 6)
    assert worker.receiver.failed
    worker.resync(7.0, 7)
    assert not worker.receiver.failed


def test_a_sender_goes_back_when_it_is_asked_to(closing: Any) -> None:
    served, other = model(), model()
    receivers = [closing(WeightReceiver(LOOPBACK, own)) for own in (served, other)]
    sender = closing(WeightSender(LOOPBACK, receivers))
    sender.send(model(5.0), version=5)
    with pytest.raises(RollbackError) as caught:
        sender.send(model(4.0), version=4)
    assert caught.value.peer in ("worker 0", "worker 1")
    assert ([receiver.version for receiver in receivers], sender.version) == ([5, 5], 5)
    assert digest(served) == digest(other) == digest(model(5.0))
    sender.send(model(4.0), version=4, allow_rollback=True)
    assert digest(served) == digest(other) == digest(model(4.0))
    assert sender.send(model(1.0)).version == 5


def test_one_worker_that_is_further_on_does_not_cost_the_others_their_version(closing: Any) -> None:
    models = [model(), model()]
    behind, ahead = (closing(WeightReceiver(LOOPBACK, own)) for own in models)
    for receiver, version in ((behind, 3), (ahead, 9)):
        with WeightSender(LOOPBACK, [receiver]) as sender:
            sender.send(model(version), version=version)
    sender = closing(WeightSender(LOOPBACK, [behind, ahead]))
    with pytest.raises(RollbackError) as caught:
        sender.send(model(5.0), version=5)
    assert (caught.value.peer, caught.value.published) == ("worker 1", 9)
    assert [digest(own) for own in models] == [digest(model(3)), digest(model(9))]
    assert [receiver.version for receiver in (behind, ahead)] == [3, 9]
    sender.send(model(5.0), version=5, allow_rollback=True)
    sender.send(model(6.0), version=6)  # what it said when it joined is not what it has now
    assert [receiver.version for receiver in (behind, ahead)] == [6, 6]


def test_a_new_sender_counts_on_after_what_failed_workers_have_published(closing: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    closing(WeightSender(LOOPBACK, [receiver])).send(model(1.0), version=41)
    receiver._served.tear("model")
    assert receiver.version is None
    assert closing(WeightSender(LOOPBACK, [receiver])).send(model(1.0)).version == 42


def test_a_target_whose_model_was_replaced_begins_anew(closing: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model(), targets={"draft": model()}))
    sender = closing(WeightSender(LOOPBACK, [receiver]))
    sender.send(model(1.0), version=7, target="draft")
    receiver.add_target("draft", model())
    sender.send(model(1.0), version=3, target="draft")
    assert receiver.versions == {"model": None, "draft": 3}


# Between two commits.


class Lost(LocalChannel):
    """Loses the connection at its finish, before or after the worker has heard of it."""

    fails = True
    before = True

    def finish_weight_update(
        self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        if self.fails and self.before:
            others_have_published.wait(20)
            raise PeerLostError("The connection was reset.")
        super().finish_weight_update(weight_version, session, update)
        if self.fails:
            raise PeerLostError("The connection was reset.")


class Published(LocalChannel):
    """Says when it has published."""

    def finish_weight_update(
        self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        super().finish_weight_update(weight_version, session, update)
        others_have_published.set()


others_have_published = threading.Event()


@pytest.fixture
def fleet(closing: Any) -> tuple[list[WeightReceiver], list[Any]]:
    others_have_published.clear()
    receivers = [closing(WeightReceiver(LOOPBACK, model())) for _ in range(2)]
    return receivers, [Published(receivers[0]), Lost(receivers[1])]


@pytest.mark.parametrize("before", [True, False], ids=["before it was heard", "after"])
def test_a_worker_that_fails_at_its_finish_does_not_take_the_version_from_the_others(
    closing: Any, fleet: tuple[list[WeightReceiver], list[Any]], before: bool
) -> None:
    receivers, channels = fleet
    channels[1].before = before
    sender = closing(WeightSender(LOOPBACK, channels))
    channels[1].fails = False
    sender.send(model(1.0), version=1)
    channels[1].fails = True
    with pytest.raises(CommitError, match="is served by worker 0, but was not published by worker 1") as caught:
        sender.send(model(2.0), version=2)
    assert (caught.value.published, caught.value.unpublished) == (("worker 0",), ("worker 1",))
    assert (caught.value.peer, caught.value.phase, caught.value.version) == ("worker 1", "finish", 2)
    assert isinstance(caught.value.__cause__, PeerLostError)
    assert sender.version == 2
    assert receivers[0].version == 2
    assert receivers[1].version == (None if before else 2)
    channels[1].fails = False
    with pytest.raises(RollbackError):
        sender.send(model(3.0), version=1)
    assert sender.send(model(3.0)).version == 3
    assert [receiver.version for receiver in receivers] == [3, 3]


def test_with_continue_it_is_lost_and_comes_back(closing: Any, fleet: tuple[list[WeightReceiver], list[Any]]) -> None:
    class Heard:
        events: list[MembershipChanged]

        def __init__(self) -> None:
            self.events = []

        @hookimpl
        def weight_transfer_membership(self, event: MembershipChanged) -> None:
            self.events.append(event)

    receivers, channels = fleet
    heard = Heard()
    sender = closing(WeightSender(CONTINUE, channels, observers=(heard,)))
    report = sender.send(model(2.0), version=2)
    assert (report.workers, [address for address, _ in report.lost]) == (("worker 0",), ["worker 1"])
    assert (sender.version, [receiver.version for receiver in receivers]) == (2, [2, None])
    channels[1].fails = False
    assert sender.send(model(3.0)).workers == ("worker 0", "worker 1")
    assert [receiver.version for receiver in receivers] == [3, 3]
    seen = [(event.worker, event.joined, event.error is None) for event in heard.events]
    lost = ("worker 1", False, False)
    assert (seen.count(lost), seen[:2]) == (1, [("worker 0", True, True), ("worker 1", True, True)])
    assert seen[-1][1:] == (True, True)
    assert heard.events[seen.index(lost)].workers == 1


def test_when_nobody_has_published_the_failure_itself_is_raised(closing: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    channel = Lost(receiver)
    others_have_published.set()
    sender = closing(WeightSender(LOOPBACK, [channel]))
    with pytest.raises(PeerLostError):
        sender.send(model(1.0), version=1)
    assert sender.version is None
