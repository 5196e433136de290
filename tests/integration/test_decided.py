"""A single worker that is told so publishes an update as soon as it has arrived: nobody else has to have it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from support.models import digest
from weight_transfer.control import HttpChannel, serve
from weight_transfer.session.sent import Sent
from weight_transfer.testing.actors import eventually
from weight_transfer_ipc.engine import IpcTrainerEngine

pytestmark = pytest.mark.timeout(60)

ENTERED = ["begin_weight_update", "decide_weight_update"]
FINISHED = "finish_weight_update"


class Plain(nn.Sequential):
    """Weights that a trainer keeps in shared memory, all of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(*(nn.Linear(16, 16) for _ in range(4)))
        self.requires_grad_(False)
        self.randomise(seed)

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


class Gate(wt.WeightReceiver):
    """Lets an update arrive only once it was decided upon, if that is to be awaited; or does not hear of decisions."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.awaits, self.is_deaf = False, False
        self.heard: set[str | None] = set()
        self.on_hearing: Callable[[], object] = lambda: None

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        joined, update = self._joined, self._update
        assert joined is not None and update is not None
        receive = joined.receive

        def gated(*arguments: Any) -> dict[str, Any]:
            report = receive(*arguments)
            with self._changed:
                assert not self.awaits or self._changed.wait_for(lambda: update.id in self.heard, 20)
            return report

        joined.receive = gated  # type: ignore[assignment,method-assign]
        try:
            return super().update_weights(update_info)
        finally:
            joined.receive = receive  # type: ignore[method-assign]

    def decide_weight_update(self, update: str, digest: str = "", session: str | None = None) -> None:
        if not self.is_deaf:
            super().decide_weight_update(update, digest, session)
        self.on_hearing()
        with self._changed:
            self.heard.add(update)
            self._changed.notify_all()


class Pair:
    """A trainer and a worker over HTTP."""

    def __init__(self, stack: ExitStack, config: wt.WeightTransferConfig) -> None:
        self.trained, self.served = Plain(0), Plain(1)
        self.receiver = Gate(config, self.served)
        stack.callback(self.receiver.close)
        server = stack.enter_context(serve(self.receiver))
        self.channel = stack.enter_context(HttpChannel(server.url))
        self.sender = stack.enter_context(wt.WeightSender(config, [self.channel]))
        self.calls: list[str] = []
        submit, decide = self.channel.submit, self.channel.decide_weight_update

        def listed(method: str, **arguments: Any) -> Any:
            self.calls.append(method)
            return submit(method, **arguments)

        def decided(update: str, digest: str = "", session: str | None = None) -> None:
            self.calls.append("decide_weight_update")
            decide(update, digest, session)

        self.channel.submit = listed  # type: ignore[method-assign]
        self.channel.decide_weight_update = decided  # type: ignore[method-assign]
        for version in range(4):
            self.send(version, version)
        self.receiver.awaits = True

    def send(self, seed: int, version: int) -> wt.TransferReport:
        """Send; see that the worker has every bit and serves the version."""
        self.calls.clear()
        self.trained.randomise(seed)
        report = self.sender.send(self.trained, version=version)
        assert self.receiver.version == self.sender.version == version
        assert digest(self.served) == digest(self.trained)
        return report


@pytest.fixture(autouse=True)
def however_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.session.moving._MUCH", 0)
    monkeypatch.setattr("weight_transfer.session.outgoing.MANY", 0)


@pytest.fixture(params=["none", "wire", "loaded"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, wt.load_config(backend="ipc", timeout=20, init_timeout=10, verify=request.param))


def test_a_decided_update_is_published_with_its_last_byte(pair: Pair) -> None:
    for version, seed in enumerate((1, 2, 1), 4):
        report = pair.send(seed, version)
        assert pair.calls == ENTERED
        assert report.workers == (pair.channel.address,)
        assert pair.receiver.status()["state"] == "ready"


def test_what_arrives_before_the_decision_is_published_as_ever(pair: Pair) -> None:
    pair.receiver.is_deaf, pair.receiver.awaits = True, False
    for version, seed in enumerate((1, 2, 1), 4):
        pair.send(seed, version)
        assert pair.calls == [*ENTERED, FINISHED]


def test_other_bytes_than_were_sent_are_not_published(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker is told to publish is named by its digest, too."""
    if pair.sender.config.verify == "none":
        pytest.skip("nothing is compared")
    with monkeypatch.context() as patch:
        patch.setattr("weight_transfer.session.comparing.SentTables.digest", property(lambda _: "another"))
        pair.send(5, 5)
        assert pair.calls == [*ENTERED, FINISHED]

    def wrong(self: Any) -> str:
        return own(self)[:-4] + "0000"

    own = Sent.table
    with monkeypatch.context() as patch:
        patch.setattr("weight_transfer.session.sent.Sent.table", wrong)
        with pytest.raises(wt.IntegrityError):
            pair.sender.send(pair.trained, version=6)
    assert pair.receiver.version is None
    pair.receiver.awaits = False
    pair.send(7, 7)


@pytest.mark.parametrize("how", ["abort", "leave"])
def test_an_update_that_is_given_up_after_the_decision_and_before_its_last_byte_is_not_published(
    pair: Pair, how: str
) -> None:
    def give_up() -> None:
        receiver = pair.receiver
        assert eventually(lambda: receiver._update is not None and receiver._update.complete, 20)
        session, update = receiver._lifecycle.session, receiver._update
        assert update is not None
        reason = "somebody changed his mind"
        end = (
            partial(receiver.leave, reason)
            if how == "leave"
            else partial(receiver.abort_weight_update, reason, session)
        )
        threading.Thread(target=end).start()
        assert eventually(lambda: update.aborted, 20)

    pair.receiver.on_hearing = give_up
    with pytest.raises(wt.TransferError, match="changed his mind"):
        pair.sender.send(pair.trained, version=9)
    assert pair.receiver.version is None
    pair.receiver.on_hearing = lambda: None
    pair.receiver.awaits = False
    pair.send(10, 10)


def test_nothing_is_decided_before_all_is_known_to_be_right(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer has other weights than it began to send: that update is nobody's."""
    monkeypatch.setattr("weight_transfer.model.looking._FIRST", 1)
    monkeypatch.setattr("weight_transfer.model.looking._MOST", 1)
    pair.receiver.awaits = False
    last = list(pair.trained.modules())[-1]
    name = next(iter(last._parameters))
    for version in (4, 5):  # the second time by stages as they are now
        setattr(last, name, nn.Parameter(torch.zeros_like(getattr(last, name)), requires_grad=False))
        for extra in range(3):
            pair.send(version, 3 * version + extra)
    setattr(last, name, nn.Parameter(torch.zeros_like(getattr(last, name)), requires_grad=False))
    pair.send(6, 20)
    begun = pair.calls.index("begin_weight_update") if "begin_weight_update" in pair.calls else -1
    aborted = pair.calls.index("abort_weight_update") if "abort_weight_update" in pair.calls else 0
    assert "decide_weight_update" not in pair.calls[begun + 1 : aborted]


def fail_once_published(pair: Pair) -> wt.CommitError:
    """Send version 8, which fails once the worker has published it; see that this is said, and the next one comes."""
    pair.trained.randomise(8)
    with pytest.raises(wt.CommitError, match="is served by") as caught:
        pair.sender.send(pair.trained, version=8)
    assert caught.value.published == (pair.channel.address,)
    assert caught.value.unpublished == ()
    assert pair.sender.version == 8
    assert digest(pair.served) == digest(pair.trained)
    pair.receiver.awaits = False
    pair.send(9, 9)
    return caught.value


def test_a_failure_after_the_worker_has_published_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    own = IpcTrainerEngine.release_source

    def failing_once(self: IpcTrainerEngine) -> None:
        monkeypatch.setattr(IpcTrainerEngine, "release_source", own)
        raise wt.TransferError("the engine holds on to something")

    monkeypatch.setattr(IpcTrainerEngine, "release_source", failing_once)
    fail_once_published(pair)


@pytest.mark.parametrize("what", ["session", "update", "digest"])
def test_a_decision_of_somebody_else_or_upon_something_else_is_none(
    pair: Pair, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = wt.WeightReceiver.decide_weight_update

    def other(self: wt.WeightReceiver, update: str, digest: str, session: str | None) -> None:
        said = {"update": update, "digest": digest, "session": session}
        own(self, **{**said, what: "another"})

    monkeypatch.setattr(wt.WeightReceiver, "decide_weight_update", other)
    pair.send(7, 7)
    assert pair.calls == [*ENTERED, FINISHED]


def test_of_two_workers_none_publishes_before_both_have_received() -> None:
    config = wt.load_config(backend="ipc", timeout=20, init_timeout=10)
    trained, models = Plain(0), [Plain(1), Plain(2)]
    heard: list[str] = []

    class Listening(wt.WeightReceiver):
        def decide_weight_update(self, update: str, digest: str = "", session: str | None = None) -> None:
            heard.append(update)

    with ExitStack() as stack:
        receivers = [stack.enter_context(Listening(config, model)) for model in models]
        urls = [stack.enter_context(serve(receiver)).url for receiver in receivers]
        sender = stack.enter_context(wt.WeightSender(config, urls))
        for version in range(6):
            trained.randomise(version)
            sender.send(trained, version=version)
            assert [receiver.version for receiver in receivers] == [version] * 2
    assert not heard


def test_an_engine_that_fails_once_the_worker_has_published_does_not_hide_that(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pair.sender.config.verify != "none":
        pytest.skip("then nothing is decided before the engine has sent everything")
    own = IpcTrainerEngine.send_weights

    def failing_in_the_end(self: IpcTrainerEngine, source: Any, manifest: Any, deadline: Any, progress: Any) -> None:
        own(self, source, manifest, deadline, progress)
        assert eventually(lambda: progress(0) or pair.receiver.version == 8, 20)
        monkeypatch.setattr(IpcTrainerEngine, "send_weights", own)
        raise wt.TransferError("the stream broke at the end")

    monkeypatch.setattr(IpcTrainerEngine, "send_weights", failing_in_the_end)
    assert "the stream broke" in str(fail_once_published(pair).cause)


def test_a_receiver_that_does_more_at_the_end_is_told_to_finish() -> None:
    ended: list[int] = []

    class Ending(wt.WeightReceiver):
        def finish_weight_update(self, *arguments: Any, **options: Any) -> None:
            ended.append(1)
            super().finish_weight_update(*arguments, **options)

    config = wt.load_config(backend="ipc", timeout=20, init_timeout=10, verify="none")
    trained, served = Plain(0), Plain(1)
    with Ending(config, served) as receiver, serve(receiver) as server, wt.WeightSender(config, [server.url]) as sender:
        for version in range(6):
            trained.randomise(version)
            sender.send(trained, version=version)
    assert len(ended) == 6
