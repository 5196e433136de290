"""Whose update it is: what a receiver takes from whom, and what a sender does when its worker became another's."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.models import CONTINUE, LOOPBACK, digest, model
from support.scripted import INIT, STATES, Worker, to_ready, to_received, to_updating
from weight_transfer import (
    ConfigError,
    HandshakeError,
    LocalChannel,
    ParallelConfig,
    PeerLostError,
    ReceiverState,
    ReplacedError,
    SessionError,
    TransferError,
    WeightReceiver,
    WeightSender,
)
from weight_transfer.testing.actors import eventually
from weight_transfer.values import versions

pytestmark = pytest.mark.timeout(60)


Call = Callable[[WeightReceiver, str | None], object]
CALLS: dict[str, Call] = {
    "start_weight_update": lambda receiver, session: receiver.start_weight_update(session),
    "update_weights": lambda receiver, session: receiver.update_weights({"timeout": 1, "session": session}),
    "finish_weight_update": lambda receiver, session: receiver.finish_weight_update(None, session),
    "abort_weight_update": lambda receiver, session: receiver.abort_weight_update("never mind", session),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("state", ["ready", "updating", "received", "failed"])
@pytest.mark.parametrize("session", ["another", ""])
def test_a_call_of_another_trainer_is_refused_and_changes_nothing(
    worker: Worker, state: str, method: str, session: str
) -> None:
    STATES[state](worker)
    before = worker.receiver.status(), worker.model.values
    with pytest.raises(SessionError, match=f"{method} of session .* has joined a trainer without one") as caught:
        CALLS[method](worker.receiver, session or "x")
    assert (caught.value.method, caught.value.state) == (method, before[0]["state"])
    assert (worker.receiver.status(), worker.model.values) == before


@pytest.mark.parametrize("method", CALLS)
def test_a_call_without_a_session_is_refused_if_the_init_had_one(worker: Worker, method: str) -> None:
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "mine"})
    with pytest.raises(SessionError, match=f"{method} without a session .* has joined session mine"):
        CALLS[method](worker.receiver, None)
    worker.receiver.start_weight_update("mine")
    worker.update(1.0, 1, session="mine")
    worker.receiver.finish_weight_update(1, "mine")
    assert (worker.receiver.version, worker.model.values) == (1, [1.0] * 3)


def test_an_abort_of_another_trainer_does_not_touch_a_running_update(worker: Worker) -> None:
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "mine"})
    worker.receiver.start_weight_update("mine")
    inside, leave = threading.Event(), threading.Event()

    def receive(engine: Any, info: Any, load_weights: Any) -> None:
        inside.set()
        assert leave.wait(20)
        worker.script.load_all(engine, info, load_weights)

    worker.script.receive = receive
    updating = threading.Thread(target=lambda: worker.update(2.0, 2, session="mine"))
    updating.start()
    assert inside.wait(20)
    for session in ("another", None):
        with pytest.raises(SessionError):
            worker.receiver.abort_weight_update("I was overtaken", session)
    assert not worker.engine.aborted.is_set()
    leave.set()
    updating.join(20)
    worker.receiver.finish_weight_update(2, "mine")
    assert (worker.receiver.version, worker.model.values) == (2, [2.0] * 3)


@pytest.mark.parametrize("arrange", [to_ready, to_updating])
def test_an_abort_leaves_no_engine_whose_connection_may_be_gone(worker: Worker, arrange: Any) -> None:
    arrange(worker)
    engine = worker.engine
    worker.receiver.abort_weight_update("the trainer gave up")
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.CREATED, "old")
    assert engine.shutdowns == 1
    with worker.receiver.serving(timeout=1) as version:
        assert version == "old"


@pytest.mark.parametrize(
    ("arrange", "state", "version"),
    [(to_ready, "created", "old"), (to_updating, "created", "old"), (to_received, "failed", None)],
)
def test_an_engine_that_knows_that_its_trainer_is_gone_ends_what_is_open(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, arrange: Any, state: str, version: Any
) -> None:
    arrange(worker)
    monkeypatch.setattr(type(worker.engine), "lost", True)
    assert (str(worker.receiver.state), worker.receiver.version) == (state, version)
    monkeypatch.setattr(type(worker.engine), "lost", False)
    worker.resync(5.0, "after")
    assert worker.receiver.version == "after"


def test_an_abort_reaches_an_engine_that_joins(worker: Worker) -> None:
    inside = threading.Event()
    errors: list[BaseException] = []

    def join(_info: Any) -> None:
        inside.set()
        assert worker.engine.aborted.wait(20)
        raise PeerLostError("interrupted")

    def init() -> None:
        try:
            worker.receiver.init_weight_transfer_engine(INIT | {"session": "mine"})
        except PeerLostError as error:
            errors.append(error)

    worker.script.join = join
    joining = threading.Thread(target=init)
    joining.start()
    assert inside.wait(20)
    worker.receiver.abort_weight_update("the trainer gave up", "mine")
    joining.join(20)
    assert [str(error) for error in errors] == ["interrupted"]
    assert worker.receiver.state is ReceiverState.CREATED


# Senders.


class Bare:
    """A channel with nothing but vLLM's signatures."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self.receiver = receiver
        self.infos: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        self.infos.append(init_info)
        return self.receiver.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.receiver.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.infos.append(update_info)
        return self.receiver.update_weights(update_info)

    def finish_weight_update(self, weight_version: int | str | None = None) -> None:
        self.receiver.finish_weight_update(weight_version)


class Overtaken(LocalChannel):
    """Lets somebody in before one of its calls."""

    def __init__(self, receiver: WeightReceiver) -> None:
        super().__init__(receiver)
        self.before: dict[str, Callable[[], object]] = {}

    def start_weight_update(self, session: str | None = None) -> None:
        self.before.pop("start", bool)()
        super().start_weight_update(session)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.before.pop("update", bool)()
        return super().update_weights(update_info)

    def finish_weight_update(
        self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        self.before.pop("finish", bool)()
        super().finish_weight_update(weight_version, session, update)


def test_a_channel_with_vllms_signatures_is_told_of_no_session(closing: Any) -> None:
    served = model()
    channel: Any = Bare(closing(WeightReceiver(LOOPBACK, served)))
    sender = closing(WeightSender(LOOPBACK, [channel]))
    for value in (1.0, 2.0):
        sender.send(model(value))
    assert digest(served) == digest(model(2.0))
    assert [("session" in info) for info in channel.infos] == [False] * 3


@pytest.mark.parametrize("config", [LOOPBACK, CONTINUE], ids=["abort", "continue"])
@pytest.mark.parametrize("call", ["start", "update", "finish"])
def test_a_sender_that_is_overtaken_ends_and_does_not_disturb_the_other_one(
    closing: Any, call: str, config: dict[str, Any]
) -> None:
    served, others = model(), model()
    receiver, other = (closing(WeightReceiver(config, own)) for own in (served, others))
    channel = Overtaken(receiver)
    slow = closing(WeightSender(config | {"timeout": 3}, [channel, other]))
    fast = closing(WeightSender(config, [receiver, other]))
    slow.send(model(1.0), version=1)
    overtaken = threading.Event()

    def overtake() -> None:
        fast.send(model(2.0), version=3)
        overtaken.set()

    channel.before[call] = overtake
    with pytest.raises(ReplacedError, match=r"another trainer \(lease \d+\) has taken this worker over") as caught:
        slow.send(model(3.0), version=3)
    assert str(caught.value.lease) in str(caught.value)
    for attempt in range(2):  # it stays refused, and asks nobody
        with pytest.raises(ReplacedError):
            slow.send(model(3.0), version=4 + attempt)
    assert overtaken.wait(20)
    with pytest.raises(ReplacedError):
        slow.connect()
    assert [(each.state, each.version) for each in (receiver, other)] == [(ReceiverState.READY, 3)] * 2
    assert digest(served) == digest(others) == digest(model(2.0))
    assert fast.send(model(4.0)).version == 4
    slow.close()
    back = closing(WeightSender(config, [channel, other]))
    assert back.send(model(5.0)).version == 5
    assert digest(served) == digest(others) == digest(model(5.0))


def test_an_update_of_the_other_one_survives_the_abort_of_the_overtaken_one(closing: Any) -> None:
    served = model()
    receiver = closing(WeightReceiver(LOOPBACK, served))
    first, second = Overtaken(receiver), Overtaken(receiver)
    slow, fast = (closing(WeightSender(LOOPBACK, [channel])) for channel in (first, second))
    slow.send(model(1.0), version=1)
    inside, leave = threading.Event(), threading.Event()

    def stand_still() -> None:
        inside.set()
        assert leave.wait(20)

    second.before["finish"] = stand_still
    overtaking = threading.Thread(target=lambda: fast.send(model(2.0), version=2))

    def overtake() -> None:
        overtaking.start()
        assert inside.wait(20)

    first.before["update"] = overtake
    with pytest.raises(ReplacedError):
        slow.send(model(3.0), version=3)
    assert receiver.state is ReceiverState.UPDATING, "it is the other one's update"
    leave.set()
    overtaking.join(20)
    assert (receiver.version, digest(served)) == (2, digest(model(2.0)))


def test_a_sender_joins_a_worker_again_that_has_left_it(closing: Any) -> None:
    served = model()
    receiver = closing(WeightReceiver(LOOPBACK, served))
    sender = closing(WeightSender(LOOPBACK, [receiver]))
    for version, value in enumerate((1.0, 2.0, 1.0)):
        sender.send(model(value))
        receiver.leave()
        assert (receiver.state, receiver.version) == (ReceiverState.CREATED, version)
        assert digest(served) == digest(model(value))


# Versions.


@pytest.mark.parametrize("version", [torch.tensor(7), torch.tensor([7], dtype=torch.int32), np.int64(7), np.uint8(7)])
def test_whole_numbers_of_numpy_and_torch_are_versions(closing: Any, version: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    report = closing(WeightSender(LOOPBACK, [receiver])).send(model(), version=version)
    assert (report.version, type(report.version), receiver.version) == (7, int, 7)


OTHERS = [1.5, "", True, b"v1", torch.tensor(1.5), torch.tensor([1, 2]), np.float32(3), [1]]
TOO_MUCH = [2**63, 10**5000, "x" * 257, "\ud800", "a\n"]


@pytest.mark.parametrize("version", [*OTHERS, *TOO_MUCH], ids=range(13))
def test_anything_else_is_a_sentence(closing: Any, version: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    sender = closing(WeightSender(LOOPBACK, [receiver]))
    with pytest.raises(ConfigError, match="A version is a whole number of 64 bits, such as"):
        sender.send(model(), version=version)
    assert receiver.state is ReceiverState.CREATED


def test_a_new_sender_goes_on_after_the_highest_version_that_its_workers_serve(closing: Any) -> None:
    receivers = [closing(WeightReceiver(LOOPBACK, model())) for _ in range(3)]
    for receiver, version in zip(receivers, (57, 3), strict=False):
        closing(WeightSender(LOOPBACK, [receiver])).send(model(), version=version)
    sender = closing(WeightSender(LOOPBACK, receivers))
    assert [sender.send(model()).version, sender.send(model()).version] == [58, 59]


def test_a_new_sender_asks_for_a_name_where_the_workers_serve_one(closing: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    closing(WeightSender(LOOPBACK, [receiver])).send(model(), version="best")
    with pytest.raises(ConfigError, match="The last version is called 'best'; name the new one"):
        closing(WeightSender(LOOPBACK, [receiver])).send(model())


@pytest.mark.parametrize(
    ("served", "following"),
    [
        ([], 0),
        (["7"], 8),
        (["7", 57, "12"], 58),
        ([3, "0"], 4),
        (["-3"], -2),
        (["999999999999999999"], 10**18),
    ],
)
def test_the_text_of_a_whole_number_counts_on_as_a_number(served: list[int | str], following: int) -> None:
    assert (versions.following(served), type(versions.following(served))) == (following, int)


@pytest.mark.parametrize("name", ["07", "7.0", "+7", " 7", "7 ", "7\n", "-0", "\u0667", "1_0", "default", "9" * 5000])
def test_any_other_text_is_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="name the new one"):
        versions.following([1, name])


class Texts(LocalChannel):
    """Keeps versions as text, as vLLM does."""

    text_versions: Any = True

    def __init__(self, receiver: WeightReceiver) -> None:
        super().__init__(receiver)
        self.infos: list[dict[str, Any]] = []
        self.finished: list[Any] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        self.infos.append(init_info)
        return super().init_weight_transfer_engine(init_info)

    def finish_weight_update(
        self, weight_version: int | str | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        self.finished.append(weight_version)
        super().finish_weight_update(weight_version, session, update)

    def status(self) -> dict[str, Any]:
        status = super().status()
        version = None if status["version"] is None else str(status["version"])
        return status | {"version": version, "versions": {"model": version}}


def test_a_channel_that_wants_text_gets_it_and_its_worker_serves_what_all_serve(closing: Any) -> None:
    plain, behind = (closing(WeightReceiver(LOOPBACK, model())) for _ in range(2))
    channel = Texts(behind)
    for expected in (0, 1):  # the second sender is told "0" by one of them
        sender = closing(WeightSender(LOOPBACK, [plain, channel]))
        assert sender.send(model(1.0)).version == expected
        assert [repr(receiver.version) for receiver in (plain, behind)] == [repr(expected)] * 2
    sender.send(model(2.0), version="best")
    assert sender.send(model(3.0), version="7").version == "7"
    assert [receiver.version for receiver in (plain, behind)] == ["7", "7"]
    assert sender.send(model(3.0)).version == 8
    assert channel.finished == ["0", "1", "best", "7", "8"]
    assert [info.get("text_versions") for info in channel.infos] == [True, True]


@pytest.mark.parametrize("declared", [False, "no", 1])
def test_a_channel_that_does_not_say_so_gets_the_version_as_it_is(closing: Any, declared: object) -> None:
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    channel = Texts(receiver)
    channel.text_versions = declared
    closing(WeightSender(LOOPBACK, [channel])).send(model(1.0), version=7)
    assert (channel.finished, receiver.version, "text_versions" in channel.infos[0]) == ([7], 7, False)


# Workers that are named wrongly.


@pytest.mark.parametrize("wrong", [8001, None, b"http://127.0.0.1:1", object(), nn.Linear(1, 1)])
def test_what_is_no_worker_is_a_sentence(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no worker; give its URL, such as 'http://127\.0\.0\.1:8001'"):
        WeightSender(LOOPBACK, [wrong])


@pytest.mark.parametrize(
    "url", ["http://[::1", "127.0.0.1:8001", "http://", "ftp://host", "", "http://host:port", "http://host:99999999"]
)
def test_what_is_no_url_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a worker's URL such as 'http://127\.0\.0\.1:8001'"):
        WeightSender(LOOPBACK, [url])


def test_one_worker_under_two_names_is_refused_before_it_joins(closing: Any) -> None:
    alone, other = (closing(WeightReceiver(LOOPBACK, model())) for _ in range(2))
    for channels in ([LocalChannel(alone), LocalChannel(alone)], [other, alone, LocalChannel(alone)]):
        sender = closing(WeightSender(LOOPBACK, channels))
        with pytest.raises(ConfigError, match=r"worker \d and worker \d are the same worker; name each worker once"):
            sender.send(model())
        assert alone.state is ReceiverState.CREATED


@pytest.mark.parametrize("ranks", [(0, 0), (1, 2), (0, 2), (1,)])
def test_receivers_of_a_replica_have_one_rank_each(closing: Any, ranks: tuple[int, ...]) -> None:
    receivers = [
        closing(WeightReceiver(LOOPBACK, model(), parallel_config=ParallelConfig(rank=rank, world_size=3)))
        for rank in ranks
    ]
    with pytest.raises(ConfigError, match=r"LocalChannel needs receivers of the ranks 0 to \d, each once, got"):
        LocalChannel(*receivers)


class Down(LocalChannel):
    """Not up yet, for so many looks."""

    looks: float = 3

    def status(self) -> dict[str, Any]:
        self.looks -= 1
        if self.looks >= 0:
            raise PeerLostError("The worker cannot be reached.", permanent=self.looks == 0.5)
        return super().status()


@pytest.mark.parametrize("config", [LOOPBACK, CONTINUE], ids=["abort", "continue"])
def test_workers_that_are_not_up_yet_are_waited_for(closing: Any, config: dict[str, Any]) -> None:
    receivers = [closing(WeightReceiver(config, model())) for _ in range(2)]
    sender = closing(WeightSender(config, [Down(receiver) for receiver in receivers]))
    assert len(sender.send(model(), version=1).workers) >= 1


def test_with_continue_nobody_waits_for_one_that_is_down_while_another_is_up(closing: Any) -> None:
    config = CONTINUE | {"init_timeout": 60, "backend": "ipc"}
    up, down = closing(WeightReceiver(config, model())), Down(closing(WeightReceiver(config, model())))
    down.looks = float("inf")
    since = time.monotonic()
    report = closing(WeightSender(config, [up, down])).send(model())
    assert (report.workers, [peer for peer, _ in report.lost]) == (("worker 0",), ["worker 1"])
    assert time.monotonic() - since < 10


@pytest.mark.parametrize("config", [LOOPBACK, CONTINUE], ids=["abort", "continue"])
def test_nobody_up_within_init_timeout_is_a_lost_peer(closing: Any, config: dict[str, Any]) -> None:
    down = Down(closing(WeightReceiver(config, model())))
    down.looks = float("inf")
    since = time.monotonic()
    with pytest.raises(PeerLostError):
        closing(WeightSender(config | {"init_timeout": 0.5}, [down])).send(model())
    assert 0.3 < time.monotonic() - since < 5


def test_a_worker_that_asking_again_cannot_help_is_not_asked_again(closing: Any) -> None:
    down = Down(closing(WeightReceiver(LOOPBACK, model())))
    down.looks = 1.5
    with pytest.raises(PeerLostError):
        closing(WeightSender(LOOPBACK | {"init_timeout": 60}, [down])).send(model())


def test_a_channel_that_exits_is_reported_and_does_not_hang(closing: Any) -> None:
    class Exiting(LocalChannel):
        def start_weight_update(self, session: str | None = None) -> None:
            raise SystemExit(3)

    sender = closing(WeightSender(LOOPBACK, [Exiting(closing(WeightReceiver(LOOPBACK, model())))]))
    since = time.monotonic()
    with pytest.raises(TransferError) as caught:
        sender.send(model())
    assert (caught.value.cause, caught.value.phase) == ("SystemExit: 3", "start")
    assert time.monotonic() - since < 10


# asyncio.


class Held(LocalChannel):
    """Stands still before one of its calls, until the test lets it go."""

    def __init__(self, receiver: WeightReceiver) -> None:
        super().__init__(receiver)
        self.at = ""
        self.inside, self.leave = threading.Event(), threading.Event()

    def _hold(self, call: str) -> None:
        if call == self.at:
            self.inside.set()
            assert self.leave.wait(30)

    def status(self) -> dict[str, Any]:
        self._hold("status")
        return super().status()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        self._hold("init")
        return super().init_weight_transfer_engine(init_info)

    def start_weight_update(self, session: str | None = None) -> None:
        self._hold("start")
        super().start_weight_update(session)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self._hold("update")
        return super().update_weights(update_info)


def test_asend_sends_while_the_loop_goes_on(closing: Any) -> None:
    served = model()
    receiver = closing(WeightReceiver(LOOPBACK, served))
    channel = Held(receiver)

    async def main() -> None:
        async with WeightSender(LOOPBACK, [channel]) as sender:
            assert (await sender.asend(model(1.0))).version == 0
            channel.at = "start"
            sending = asyncio.create_task(sender.asend(model(2.0)))
            while not channel.inside.is_set():
                await asyncio.sleep(0.01)
            channel.leave.set()
            assert (await sending).version == 1
            with pytest.raises(ConfigError, match="no parameters"):
                await sender.asend(nn.Identity())

    asyncio.run(main())
    assert (receiver.version, digest(served)) == (1, digest(model(2.0)))


@pytest.mark.parametrize(
    ("backend", "at"),  # over gloo nothing can end a broadcast but its deadline
    [
        *itertools.product(("loopback", "ipc"), ("status", "init", "start", "update")),
        ("nccl", "init"),
        ("nccl", "start"),
    ],
)
def test_a_cancelled_asend_aborts_the_update_on_the_workers(closing: Any, backend: str, at: str) -> None:
    served, config = model(), LOOPBACK | {"backend": backend}
    receiver, other = closing(WeightReceiver(config, served)), closing(WeightReceiver(config, model()))
    channel = Held(receiver)
    sender = closing(WeightSender(config, [channel, other]))
    if at in ("start", "update"):
        sender.send(model(1.0), version=1)
    channel.at = at

    async def main() -> None:
        sending = asyncio.create_task(sender.asend(model(2.0), version=2))
        while not channel.inside.is_set():
            await asyncio.sleep(0.01)
        since = time.monotonic()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert time.monotonic() - since < 10

    asyncio.run(main())
    assert ReceiverState.UPDATING not in (receiver.state, other.state)
    assert 2 not in (receiver.version, other.version)
    channel.at = ""
    channel.leave.set()
    turns = sender._fleet.peers[0].turns
    assert eventually(lambda: not turns.busy, 15)  # what comes late changes nothing
    sender.send(model(3.0), version=3)
    assert (receiver.version, digest(served)) == (3, digest(model(3.0)))


def test_a_worker_of_another_backend_still_fails_the_handshake(closing: Any) -> None:
    receiver = closing(WeightReceiver(LOOPBACK | {"backend": "ipc"}, model()))
    with pytest.raises(HandshakeError, match="The worker uses backend 'ipc'"):
        closing(WeightSender(LOOPBACK, [receiver])).send(model())


def test_a_sender_does_not_import_torch_distributed(closing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    receiver = closing(WeightReceiver(LOOPBACK, model()))
    sender = closing(WeightSender(LOOPBACK, [receiver]))
    sender.connect()
    sender.send(model())
    assert receiver.version == 0
    assert "torch.distributed" not in sys.modules
