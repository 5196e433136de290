"""The trainer's session, with receivers in threads of this process: every worker gets every bit, or is named."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from support.listeners import Recorder
from support.models import Small, digest
from weight_transfer import (
    CommitError,
    ConfigError,
    HandshakeError,
    IntegrityError,
    LifecycleError,
    LocalChannel,
    Manifest,
    ManifestMismatchError,
    ModuleSource,
    ParallelConfig,
    PeerLostError,
    ReceiverState,
    TransferError,
    TransferFinished,
    TransferProgress,
    TransferReport,
    TransferStarted,
    TransferTimeoutError,
    WeightReceiver,
    WeightSender,
    WeightSource,
)
from weight_transfer.plan.buckets import Packer
from weight_transfer.testing.loopback import engine as loopback
from weight_transfer.values.deadline import Deadline

pytestmark = pytest.mark.timeout(60)

LOOPBACK: dict[str, Any] = {"backend": "loopback", "timeout": 20, "init_timeout": 20, "bucket_bytes": 512}
IPC: dict[str, Any] = LOOPBACK | {"backend": "ipc"}
CONTINUE = IPC | {"on_worker_failure": "continue"}


class Worker:
    """An inference worker: a model, its receiver, and a loader that fails when it is told to."""

    def __init__(self, config: dict[str, Any], rank: int = 0, world_size: int = 1, seed: int = 99) -> None:
        self.model = Small(seed)
        self.fail_with: Exception | None = None
        self.receiver = WeightReceiver(
            config,
            self.model,
            parallel_config=ParallelConfig(rank=rank, world_size=world_size),
            load_weights=self.load,
        )

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        targets = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in weights:
                if self.fail_with is not None and name.startswith("layers.2"):
                    raise self.fail_with
                targets[name].copy_(tensor)

    @property
    def serves(self) -> tuple[Any, str]:
        return self.receiver.version, digest(self.model)


Make = Callable[..., Any]


def session_of(worker: Worker) -> str | None:
    """Return the session that a worker has joined."""
    return worker.receiver._lifecycle.session


@pytest.fixture
def new_worker(closing: Callable[[Any], Any]) -> Callable[..., Worker]:
    def _new_worker(config: dict[str, Any] = LOOPBACK, **arguments: Any) -> Worker:
        worker = Worker(config, **arguments)
        closing(worker.receiver)
        return worker

    return _new_worker


@pytest.fixture
def new_sender(closing: Callable[[Any], Any]) -> Callable[..., WeightSender]:
    def _new_sender(workers: list[Any], config: dict[str, Any] = LOOPBACK, **arguments: Any) -> WeightSender:
        channels = [worker.receiver if isinstance(worker, Worker) else worker for worker in workers]
        sender: WeightSender = closing(WeightSender(config, channels, **arguments))
        return sender

    return _new_sender


@pytest.fixture
def pair(new_worker: Make, new_sender: Make) -> tuple[WeightSender, list[Worker]]:
    """A sender and two workers of the loopback backend."""
    workers = [new_worker(), new_worker()]
    return new_sender(workers), workers


class Channel:
    """A channel of the user's own, in front of a receiver; a test can replace any of its methods."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self.receiver = receiver

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        return self.receiver.init_weight_transfer_engine(json.loads(json.dumps(init_info)))

    def start_weight_update(self) -> None:
        self.receiver.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        return self.receiver.update_weights(json.loads(json.dumps(update_info)))

    def finish_weight_update(self, weight_version: int | str | None = None) -> None:
        self.receiver.finish_weight_update(weight_version)


class FullChannel(Channel):
    address = "http://worker.example:8001"

    def abort_weight_update(self, reason: str = "") -> None:
        self.receiver.abort_weight_update(reason)

    def status(self) -> dict[str, Any]:
        return self.receiver.status()


METHODS = ("status", "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
PHASE_OF = dict(zip(METHODS, ("init", "init", "start", "update", "finish"), strict=True))


# The bits.


def test_every_bit_goes_from_a_to_b_and_back_to_a_to_three_workers_behind_two_channels(
    new_worker: Make, new_sender: Make
) -> None:
    alone = new_worker(seed=97)
    replica = [new_worker(rank=rank, world_size=2, seed=98 + rank) for rank in (0, 1)]
    sender = new_sender([alone, LocalChannel(*(worker.receiver for worker in replica))])
    a, b = Small(1), Small(2)
    assert digest(a) != digest(b)
    for version, model in enumerate((a, b, a)):
        report = sender.send(model)
        assert report.version == sender.version == version
        assert [worker.serves for worker in (alone, *replica)] == [(version, digest(model))] * 3


def test_one_model_that_is_trained_on_is_sent_as_it_is_at_each_send(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    model = Small(1)
    seen = []
    for seed in (1, 2, 1):
        model.randomise(seed)
        sender.send(model)
        seen.append(digest(model))
        model.randomise(77)  # the source may change as soon as send returns
        assert [digest(worker.model) for worker in workers] == seen[-1:] * 2
    assert seen[0] == seen[2] != seen[1]


def test_kernel_format_writes_into_the_models_own_tensors(new_sender: Make, closing: Callable[[Any], Any]) -> None:
    model, a, b = Small(9), Small(1), Small(2)
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    receiver = closing(WeightReceiver(LOOPBACK, model))
    sender = new_sender([receiver], LOOPBACK | {"is_checkpoint_format": False})
    for version in (a, b, a):
        sender.send(version)
        assert digest(model) == digest(version)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses


def test_the_report_says_what_went_where_and_at_what_cost(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, _ = pair
    model = Small(1)
    manifest = ModuleSource(model).manifest()
    report = sender.send(model, version="step-5")
    assert isinstance(report, TransferReport)
    assert (report.backend, report.version) == ("loopback", "step-5")
    assert (report.nbytes, report.params) == (manifest.nbytes, len(manifest.params))
    assert (report.workers, report.lost) == (("worker 0", "worker 1"), ())
    assert list(report.seconds) == ["init", "start", "update", "finish"]
    assert report.total_seconds == pytest.approx(sum(report.seconds.values()))
    assert report.gbps == pytest.approx(manifest.nbytes / report.seconds["update"] / 1e9)
    assert str(report).startswith("version step-5: 10.3 KB to 2 workers over loopback at ")


def test_the_report_says_how_the_bytes_travelled_and_what_each_worker_warns_of(
    new_sender: Make, closing: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (
        closing(WeightReceiver(LOOPBACK, Small(seed), parallel_config=ParallelConfig(rank=rank, world_size=size)))
        for seed, rank, size in ((1, 0, 2), (2, 1, 2), (3, 0, 1))
    )
    sender = new_sender([LocalChannel(first, second), third], workers_per_channel=1)
    sender.connect()
    for receiver, transport, warnings in (
        (first, "shm", ("slow.",)),
        (second, "tcp", ("slow.", "lossy.")),
        (third, "", ()),
    ):
        monkeypatch.setattr(receiver._joined.engine, "transport", transport)
        monkeypatch.setattr(receiver._joined.engine, "warnings", warnings)
    report = sender.send(Small(4))
    assert report.transports == {"worker 0": "shm, tcp"}
    assert report.warnings == ("worker 0: slow.", "worker 0: lossy.")
    assert "over loopback, shm, tcp, at " in str(report)
    assert str(report).endswith("; warning: worker 0: slow.; warning: worker 0: lossy.")


@pytest.mark.parametrize("answer", [None, {"message": "ok"}, {"transport": 3, "warnings": "no list"}, ["shm"]])
def test_without_verify_a_foreign_channel_may_answer_an_update_as_it_likes(
    new_sender: Make, closing: Callable[[Any], Any], answer: Any
) -> None:
    class Foreign(LocalChannel):
        def update_weights(self, update_info: dict[str, Any]) -> Any:
            super().update_weights(update_info)
            return answer

    model = Small(1)
    receiver = closing(WeightReceiver(LOOPBACK, model))
    report = new_sender([Foreign(receiver)], LOOPBACK | {"verify": "none"}).send(Small(2))
    assert digest(model) == digest(Small(2))
    assert (report.transports, report.warnings) == ({}, ())


def test_extra_memory_is_buckets_times_bucket_bytes_and_comes_back(
    pair: tuple[WeightSender, list[Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rings: dict[str, Any] = {}
    monkeypatch.setattr(loopback, "_rings", rings)
    sender, _ = pair
    for seed in (1, 2):
        assert sender.send(Small(seed)).extra_memory == 2 * 512
        (ring,) = rings.values()
        assert sum(buffer.nbytes for buffer in ring.buffers) == 2 * 512
    sender.close()
    assert rings == {}


def test_no_reader_ever_sees_a_torn_version(new_worker: Make, new_sender: Make) -> None:
    worker = new_worker()
    sender = new_sender([worker])
    a, b = Small(1), Small(2)
    expected = {0: digest(a), 1: digest(b)}
    sender.send(a, version=0)
    done, seen, torn = threading.Event(), set(), []

    def sample() -> None:
        while not done.is_set():
            with worker.receiver.serving() as version:
                seen.add(version)
                if digest(worker.model) != expected[version % 2]:
                    torn.append(version)

    readers = [threading.Thread(target=sample) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in range(1, 21):
        sender.send((a, b)[version % 2], version=version)
    done.set()
    for reader in readers:
        reader.join(20)
    assert torn == []
    assert len(seen) > 2


# Versions.


def test_versions_count_from_0_unless_they_are_named(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    model = Small(1)
    assert sender.version is None
    assert [sender.send(model).version, sender.send(model).version] == [0, 1]
    assert [sender.send(model, version=10).version, sender.send(model).version] == [10, 11]
    assert sender.send(model, version="final").version == "final"
    assert [worker.receiver.version for worker in workers] == ["final"] * 2
    with pytest.raises(ConfigError, match="The last version is called 'final'; name the new one"):
        sender.send(model)
    assert sender.send(model, version=0).version == 0


def test_a_failed_send_takes_no_version(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    sender.send(Small(1))
    workers[0].fail_with = OSError("full")
    with pytest.raises(TransferError) as caught:
        sender.send(Small(2))
    assert (caught.value.version, sender.version) == (1, 0)
    workers[0].fail_with = None
    assert sender.send(Small(2)).version == 1


# Workers that fail.


def test_a_model_that_does_not_fit_leaves_everything_as_it_was_and_usable(
    new_sender: Make, closing: Callable[[Any], Any]
) -> None:
    models = [Small(8), Small(9)]
    receivers = [closing(WeightReceiver(LOOPBACK, model)) for model in models]  # without loaders: shapes are checked
    sender = new_sender(receivers)
    sender.send(Small(1))
    with pytest.raises(ManifestMismatchError) as caught:
        sender.send(Small(2, rows=17))
    error = caught.value
    assert "embed.weight: bfloat16 [17, 32] was sent, but the worker's model has bfloat16 [16, 32]" in str(error)
    assert error.peer in {"worker 0", "worker 1"}
    assert str(error).startswith(f"{error.peer}: ")
    assert (error.backend, error.phase, error.version) == ("loopback", "update", 1)
    assert [receiver.version for receiver in receivers] == [0, 0]
    assert [digest(model) for model in models] == [digest(Small(1))] * 2
    sender.send(Small(2))
    assert [digest(model) for model in models] == [digest(Small(2))] * 2


@pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])
def test_a_worker_whose_loader_raises_is_named_and_the_next_send_recovers_all(
    new_worker: Make, new_sender: Make, config: dict[str, Any]
) -> None:
    workers = [new_worker(config) for _ in range(3)]
    sender = new_sender(workers, config)
    a, b = Small(1), Small(2)
    sender.send(a)
    workers[1].fail_with = KeyError("layers.2.weight")
    since = time.monotonic()
    with pytest.raises(TransferError) as caught:
        sender.send(b)
    assert time.monotonic() - since < 10, "the failure is reported at once, and not at the deadline"
    error = caught.value
    assert (error.peer, error.phase, error.version, error.backend) == ("worker 1", "update", 1, config["backend"])
    assert error.cause == "KeyError: 'layers.2.weight'"
    assert [worker.receiver.version for worker in workers if worker.receiver.version == 1] == []
    assert workers[1].receiver.state is ReceiverState.FAILED
    assert ReceiverState.UPDATING not in [worker.receiver.state for worker in workers], (
        "the others were told to give up"
    )
    workers[1].fail_with = None
    for model in (b, a):
        sender.send(model)
        assert [worker.serves for worker in workers] == [(sender.version, digest(model))] * 3


def test_one_failing_rank_of_a_replica_fails_the_replica_at_once(new_worker: Make, new_sender: Make) -> None:
    replica = [new_worker(rank=rank, world_size=2) for rank in (0, 1)]
    sender = new_sender([LocalChannel(*(worker.receiver for worker in replica))])
    sender.send(Small(1))
    replica[1].fail_with = KeyError("layers.2.weight")
    since = time.monotonic()
    with pytest.raises(TransferError) as caught:
        sender.send(Small(2))
    assert time.monotonic() - since < 10
    assert caught.value.cause == "KeyError: 'layers.2.weight'"
    assert [worker.receiver.version for worker in replica] == [None, None]
    replica[1].fail_with = None
    sender.send(Small(2))
    assert [worker.serves for worker in replica] == [(1, digest(Small(2)))] * 2


def test_with_continue_the_others_publish_and_the_failed_one_rejoins(new_worker: Make, new_sender: Make) -> None:
    workers = [new_worker(CONTINUE) for _ in range(3)]
    sender = new_sender(workers, CONTINUE)
    a, b = Small(1), Small(2)
    assert sender.send(a).lost == ()
    workers[1].fail_with = OSError("full")
    report = sender.send(b)
    assert report.workers == ("worker 0", "worker 2")
    ((peer, text),) = report.lost
    assert peer == "worker 1"
    assert "OSError: full" in text
    assert [worker.receiver.version for worker in workers] == [1, None, 1]
    assert [digest(workers[index].model) for index in (0, 2)] == [digest(b)] * 2
    workers[1].fail_with = None
    report = sender.send(a)
    assert (report.workers, report.lost) == (("worker 0", "worker 1", "worker 2"), ())
    assert [worker.serves for worker in workers] == [(2, digest(a))] * 3


def test_with_continue_a_send_that_reaches_nobody_is_an_error(new_worker: Make, new_sender: Make) -> None:
    workers = [new_worker(CONTINUE) for _ in range(2)]
    sender = new_sender(workers, CONTINUE)
    sender.send(Small(1))
    for worker in workers:
        worker.fail_with = OSError("full")
    with pytest.raises(TransferError, match="OSError: full"):
        sender.send(Small(2))
    for worker in workers:
        worker.fail_with = None
    sender.send(Small(2))
    assert [worker.serves for worker in workers] == [(1, digest(Small(2)))] * 2


def test_with_continue_workers_that_fail_one_after_another_are_no_success_either(
    new_sender: Make, closing: Callable[[Any], Any]
) -> None:
    class Unreachable(FullChannel):
        def status(self) -> dict[str, Any]:
            raise PeerLostError("The worker cannot be reached.")

    def fail(_weights: object) -> None:
        raise OSError("full")

    model = nn.Linear(2, 2)
    failing, unreachable = (closing(WeightReceiver(CONTINUE, nn.Linear(2, 2), load_weights=fail)) for _ in range(2))
    sender = new_sender([Unreachable(unreachable), failing], CONTINUE)
    with pytest.raises(TransferError, match="OSError: full") as caught:
        sender.send(model)
    assert caught.value.peer == "worker 1"
    assert sender.version is None


def test_a_channel_that_raises_anything_is_reported_with_its_cause(new_worker: Make, new_sender: Make) -> None:
    class Broken(FullChannel):
        def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError("rpc")

    workers = [new_worker(), new_worker()]
    sender = new_sender([workers[0], Broken(workers[1].receiver)])
    with pytest.raises(TransferError) as caught:
        sender.send(Small(1))
    assert (caught.value.peer, caught.value.phase) == (FullChannel.address, "update")
    assert caught.value.cause == "ZeroDivisionError: rpc"
    assert [worker.receiver.version for worker in workers] == [None, None]


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_that_never_returns_is_a_timeout_that_names_it(
    new_worker: Make, new_sender: Make, method: str
) -> None:
    config = LOOPBACK | {"timeout": 1.0, "init_timeout": 1.0}  # good updates have that, too
    workers = [new_worker(config), new_worker(config)]
    release = threading.Event()
    channel = FullChannel(workers[1].receiver)

    def hang(*_: object) -> None:
        release.wait(30)
        raise PeerLostError("released at the end of the test")

    setattr(channel, method, hang)
    sender = new_sender([workers[0], channel], config)
    since = time.monotonic()
    with pytest.raises(CommitError if method == "finish_weight_update" else TransferTimeoutError) as caught:
        sender.send(Small(1))
    seconds = time.monotonic() - since
    release.set()
    assert 0.4 < seconds < 5
    assert re.search("deadline|did not answer", str(caught.value))
    assert (caught.value.peer, caught.value.phase) == (FullChannel.address, PHASE_OF[method])
    delattr(channel, method)
    report = sender.send(Small(2))
    assert report.workers == ("worker 0", FullChannel.address)
    assert [digest(worker.model) for worker in workers] == [digest(Small(2))] * 2


@pytest.mark.parametrize("phase", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_worker_that_stands_still_does_not_hold_the_trainer_beyond_its_deadline(
    new_worker: Make, new_sender: Make, phase: str
) -> None:
    """Nor is it waited for until it has confirmed the abort."""
    config = LOOPBACK | {"timeout": 2}
    release = threading.Event()
    channel: Any = FullChannel(new_worker(config).receiver)
    for method in (phase, "abort_weight_update"):
        setattr(channel, method, lambda *_: release.wait(30))
    since = time.monotonic()
    with pytest.raises(TransferTimeoutError):
        new_sender([channel], config).send(Small(1))
    assert time.monotonic() - since < 2 + 5  # and not the abort's time on top of it
    release.set()


def test_with_continue_whoever_uses_up_all_the_time_before_the_first_byte_is_named(
    new_worker: Make, new_sender: Make
) -> None:
    config = CONTINUE | {"timeout": 1}
    release = threading.Event()
    channel: Any = FullChannel(new_worker(config).receiver)
    channel.start_weight_update = lambda: release.wait(30)
    with pytest.raises(TransferTimeoutError) as failure:
        new_sender([new_worker(config), channel], config).send(Small(1))
    assert (failure.value.peer, failure.value.phase) == (FullChannel.address, "start")
    release.set()


def test_an_update_waits_for_an_abort_that_names_no_session_and_comes_late(new_worker: Make, new_sender: Make) -> None:
    config = LOOPBACK | {"timeout": 1}
    worker = new_worker(config)
    channel: Any = FullChannel(worker.receiver)
    start, abort, may_abort = channel.start_weight_update, channel.abort_weight_update, threading.Event()

    def hang() -> None:
        channel.start_weight_update = start
        assert may_abort.wait(30)

    def abort_late(reason: str) -> None:
        assert may_abort.wait(30)
        abort(reason)

    channel.start_weight_update, channel.abort_weight_update = hang, abort_late
    sender = new_sender([channel], config | {"init_timeout": 20})
    with pytest.raises(TransferTimeoutError):
        sender.send(Small(1))
    threading.Timer(0.3, may_abort.set).start()
    sender.send(Small(2))
    assert worker.serves == (0, digest(Small(2)))


def test_nobody_reacts_to_a_failed_worker_any_more_once_the_update_has_ended(
    new_worker: Make, new_sender: Make
) -> None:
    """Else that would end the next update."""
    fleet = new_sender([new_worker()])._fleet
    reacts, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def fail(_peer: object) -> None:
        raise OSError("the worker has failed")

    def react(_peer: object) -> None:
        reacts.set()
        assert may_end.wait(20)

    fleet.call(fleet.peers, fail, "update_weights", Deadline(20), react)
    assert reacts.wait(20)

    def abort() -> None:
        fleet.abort("it has failed")
        ended.set()

    threading.Thread(target=abort).start()
    assert not ended.wait(0.2)
    may_end.set()
    assert ended.wait(20)


def test_a_worker_that_samples_for_too_long_keeps_its_version(new_worker: Make, new_sender: Make) -> None:
    config = LOOPBACK | {"timeout": 1.0}
    workers = [new_worker(config), new_worker(LOOPBACK)]
    sender = new_sender(workers, config)
    sender.send(Small(1))
    with workers[0].receiver.serving():
        with pytest.raises(TransferTimeoutError) as caught:
            sender.send(Small(2))
        assert caught.value.peer == "worker 0"
        assert workers[1].receiver.version == 0
        with workers[0].receiver.serving() as version:  # its own deadline passes at about the same time
            assert version == 0
    sender.send(Small(2))
    assert [worker.serves for worker in workers] == [(1, digest(Small(2)))] * 2


def test_a_worker_that_was_restarted_joins_again_within_the_next_send(new_worker: Make, new_sender: Make) -> None:
    workers = [new_worker(), new_worker()]
    channel = FullChannel(workers[1].receiver)
    sender = new_sender([workers[0], channel])
    sender.send(Small(1))
    workers[1].receiver.close()
    workers[1] = new_worker(seed=5)
    channel.receiver = workers[1].receiver
    report = sender.send(Small(2))
    assert report.workers == ("worker 0", FullChannel.address)
    assert [worker.serves for worker in workers] == [(1, digest(Small(2)))] * 2


def test_a_worker_of_another_backend_is_a_failed_handshake(new_worker: Make, new_sender: Make) -> None:
    with pytest.raises(HandshakeError, match="The worker uses backend 'ipc', the trainer 'loopback'") as caught:
        new_sender([new_worker(), new_worker(IPC)]).connect()
    assert caught.value.peer == "worker 1"


# The source.


class Generated(WeightSource):
    """A source that a test scripts: calls ``at(pass, index)`` before each tensor."""

    def __init__(self, model: nn.Module, at: Callable[[int, int], None], collective: bool = False) -> None:
        self._inner = ModuleSource(model)
        self._at = at
        self._collective = collective
        self.passes = 0
        self.yielded = 0

    def manifest(self) -> Manifest:
        return self._inner.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        number = self.passes
        for index, item in enumerate(self._inner):
            self._at(number, index)
            self.yielded += 1
            yield item

    @property
    def collective(self) -> bool:
        return self._collective


def raise_at(number: int, index: int, error: Exception) -> Callable[[int, int], None]:
    def at(current: int, place: int) -> None:
        if (current, place) == (number, index):
            raise error

    return at


@pytest.mark.parametrize(
    ("raised", "kind"), [(OSError("disk on fire"), TransferError), (TimeoutError("all-gather"), TransferTimeoutError)]
)
@pytest.mark.parametrize("verify", ["none", "wire"])
def test_a_source_that_raises_midway_fails_the_update_and_the_next_send_recovers(
    new_worker: Make, new_sender: Make, verify: str, raised: Exception, kind: type[TransferError]
) -> None:
    workers = [new_worker(), new_worker()]
    sender = new_sender(workers, LOOPBACK | {"verify": verify})
    sender.send(Small(1))
    since = time.monotonic()
    with pytest.raises(kind) as caught:
        sender.send(Generated(Small(2), raise_at(1, 5, raised)))
    assert time.monotonic() - since < 10
    assert type(caught.value) is kind
    assert caught.value.cause == f"{type(raised).__name__}: {raised}"
    assert (caught.value.backend, caught.value.version) == ("loopback", 1)
    assert (caught.value.peer, caught.value.phase) == ("trainer", "update")
    assert 1 not in [worker.receiver.version for worker in workers]
    sender.send(Small(2))
    assert [worker.serves for worker in workers] == [(1, digest(Small(2)))] * 2


def test_a_source_that_is_too_slow_is_a_timeout(new_worker: Make, new_sender: Make) -> None:
    config = LOOPBACK | {"timeout": 0.3}
    worker = new_worker()
    stuck = threading.Event()
    since = time.monotonic()
    with pytest.raises(TransferTimeoutError):
        new_sender([worker], config).send(Generated(Small(1), lambda number, index: stuck.wait(0.1) and None))
    assert time.monotonic() - since < 5
    assert worker.receiver.version is None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (nn.Identity(), "The weights to send have no parameters"),
        ({"weight": torch.zeros(1)}, "Weights to send must be an nn.Module or a WeightSource, got dict"),
    ],
)
def test_nothing_to_send_is_an_error(pair: tuple[WeightSender, list[Worker]], weights: Any, words: str) -> None:
    sender, _ = pair
    with pytest.raises(ConfigError) as caught:
        sender.send(weights)
    assert words in str(caught.value)
    assert sender.send(Small(1)).version == 0


# Verifying.


def corrupt(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    """Flip one bit on the wire: in the trainer's bucket of that number, after it was packed."""
    honest = Packer.packing

    def packing(self: Any, *arguments: Any, **options: Any) -> Iterator[int]:
        for index, nbytes in enumerate(honest(self, *arguments, **options)):
            if index == bucket:
                next(view for view in self._views[index] if view.numel())[0] ^= 1
            yield nbytes

    monkeypatch.setattr(Packer, "packing", packing)


def test_verify_finds_one_wrong_bit_on_the_wire_and_names_the_parameter(
    new_worker: Make, new_sender: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [new_worker(), new_worker()]
    sender = new_sender(workers, LOOPBACK | {"verify": "wire"})
    a, b = Small(1), Small(2)
    sender.send(a)
    with monkeypatch.context() as wire:
        corrupt(wire, bucket=1)
        with pytest.raises(IntegrityError) as caught:
            sender.send(b)
    error = caught.value
    assert error.param is not None
    assert error.param in dict(b.named_parameters())
    assert error.expected is not None
    assert error.got is not None
    assert error.expected != error.got
    assert error.peer in {"worker 0", "worker 1"}
    assert 1 not in [worker.receiver.version for worker in workers]
    sender.send(b)
    assert [worker.serves for worker in workers] == [(1, digest(b))] * 2


def test_without_verify_nobody_looks_at_the_bits(
    new_worker: Make, new_sender: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    corrupt(monkeypatch, bucket=1)
    new_sender([worker], LOOPBACK | {"verify": "none"}).send(Small(1))
    assert worker.receiver.version == 0
    assert digest(worker.model) != digest(Small(1)), "the corrupted bit of the test above does reach a worker"


# The control plane.


class Counting(FullChannel):
    """Counts the bytes of JSON that a channel carries."""

    def __init__(self, receiver: WeightReceiver) -> None:
        super().__init__(receiver)
        self.nbytes = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        self.nbytes += len(json.dumps(init_info))
        return super().init_weight_transfer_engine(init_info)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.nbytes += len(json.dumps(update_info))
        return super().update_weights(update_info)


@pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])
def test_control_traffic_of_a_steady_update_does_not_grow_with_the_number_of_parameters(
    new_sender: Make, closing: Callable[[Any], Any], config: dict[str, Any]
) -> None:
    sizes = []
    for count in (2, 600):
        model, served = (nn.ParameterList(torch.full((3,), fill) for _ in range(count)) for fill in (1.0, 0.0))
        channel = Counting(closing(WeightReceiver(config, served)))
        sender = new_sender([channel], config)
        sender.send(model, version=1)
        channel.nbytes = 0
        with torch.no_grad():
            for parameter in model:
                parameter.add_(1)
        sender.send(model, version=2)
        assert all(bool((parameter == 2).all()) for parameter in served)
        sizes.append(channel.nbytes)
    assert sizes[1] <= sizes[0] + 20 < 1024


@pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])
def test_a_bare_channel_with_vllms_four_methods_is_enough(
    new_worker: Make, new_sender: Make, config: dict[str, Any]
) -> None:
    worker = new_worker(config)
    channel = Channel(worker.receiver)
    assert not hasattr(channel, "status")
    sender = new_sender([channel], config)
    for model in (Small(1), Small(2), Small(1)):
        sender.send(model)
        assert worker.serves == (sender.version, digest(model))
    worker.fail_with = OSError("full")
    with pytest.raises(TransferError, match="OSError: full"):
        sender.send(Small(2))
    worker.fail_with = None
    sender.send(Small(2))
    assert worker.serves == (3, digest(Small(2)))


def test_a_bare_channel_may_front_several_workers_if_the_sender_is_told(new_worker: Make, new_sender: Make) -> None:
    class Replica:
        """Four methods, two workers."""

        def __init__(self, *receivers: WeightReceiver) -> None:
            both = LocalChannel(*receivers)
            self.init_weight_transfer_engine = both.init_weight_transfer_engine
            self.start_weight_update = both.start_weight_update
            self.update_weights = both.update_weights
            self.finish_weight_update = both.finish_weight_update

    workers = [new_worker(rank=rank, world_size=2) for rank in (0, 1)]
    sender = new_sender([Replica(*(worker.receiver for worker in workers))], workers_per_channel=2)
    sender.send(Small(1))
    assert [worker.serves for worker in workers] == [(0, digest(Small(1)))] * 2


def test_a_replica_tells_its_status_as_one(new_worker: Make, new_sender: Make) -> None:
    workers = [new_worker(rank=rank, world_size=2) for rank in (0, 1)]
    channel = LocalChannel(*(worker.receiver for worker in workers))
    assert channel.status() == {
        "state": "created",
        "version": None,
        "versions": {"model": None},
        "committed": {},
        "updates": {},
        "prepared": None,
        "lease": None,
        "published": None,
        "backend": "loopback",
        "device": "cpu",
        "workers": 2,
        "progress": None,
        "error": None,
        "digests": {},
        "id": ",".join(worker.receiver.status()["id"] for worker in workers),
    }
    new_sender([channel]).send(Small(1), version=4)
    assert (channel.status()["state"], channel.status()["version"]) == ("ready", 4)
    assert channel.status()["published"] == max(worker.receiver.status()["published"] for worker in workers)
    workers[1].receiver.start_weight_update(session_of(workers[1]))
    assert (channel.status()["state"], channel.status()["version"]) == ("mixed", None)


# The session.


def test_workers_can_be_joined_before_the_first_send(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    sender.connect()
    assert [worker.receiver.state for worker in workers] == [ReceiverState.READY] * 2
    sender.connect()
    sender.send(Small(1))
    assert [worker.receiver.version for worker in workers] == [0, 0]


def test_a_failed_connect_can_be_repeated(new_worker: Make, new_sender: Make) -> None:
    worker = new_worker()
    channel: Any = FullChannel(worker.receiver)

    def refuse(_info: dict[str, Any]) -> None:
        raise HandshakeError("Not today.")

    channel.init_weight_transfer_engine = refuse
    sender = new_sender([channel])
    with pytest.raises(HandshakeError, match="Not today") as caught:
        sender.connect()
    assert caught.value.peer == FullChannel.address
    del channel.init_weight_transfer_engine
    sender.connect()
    assert worker.receiver.state is ReceiverState.READY


@pytest.mark.parametrize("workers", [[], (), "http://127.0.0.1:8001"])
def test_a_sender_needs_a_list_of_workers(workers: Any) -> None:
    with pytest.raises(ConfigError, match="WeightSender needs a list of workers"):
        WeightSender(LOOPBACK, workers)


def test_a_second_thread_is_refused_while_one_sends(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    inside, leave = threading.Event(), threading.Event()

    def at(_number: int, index: int) -> None:
        inside.set()
        assert leave.wait(20)

    model = Small(1)
    sending = threading.Thread(target=lambda: sender.send(Generated(model, at)))
    sending.start()
    assert inside.wait(20)
    for act in (lambda: sender.send(model), sender.connect):
        with pytest.raises(LifecycleError, match="another thread is sending; one update at a time") as caught:
            act()
        assert caught.value.state == "sending"
    leave.set()
    sending.join(20)
    assert [worker.serves for worker in workers] == [(0, digest(model))] * 2


def test_a_closed_sender_refuses_and_its_workers_go_on_serving(pair: tuple[WeightSender, list[Worker]]) -> None:
    sender, workers = pair
    with sender:
        sender.send(Small(1))
    sender.close()
    for method, act in {"send": lambda: sender.send(Small(2)), "connect": sender.connect}.items():
        with pytest.raises(LifecycleError, match="this sender is closed; create a new one") as caught:
            act()
        assert (caught.value.method, caught.value.state) == (method, "closed")
    assert [worker.serves for worker in workers] == [(0, digest(Small(1)))] * 2


@pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])
def test_a_new_sender_takes_the_workers_over(new_worker: Make, new_sender: Make, config: dict[str, Any]) -> None:
    workers = [new_worker(config), new_worker(config)]
    for version, seed in enumerate((1, 2, 1)):
        sender = new_sender(workers, config)
        sender.send(Small(seed))
        sender.close()
        assert [worker.serves for worker in workers] == [(version, digest(Small(seed)))] * 2


# Listeners.


def test_both_roles_tell_of_the_start_the_bytes_and_the_end_in_this_order(
    new_sender: Make, closing: Callable[[Any], Any]
) -> None:
    trainer, worker = Recorder(), Recorder()
    receiver = closing(WeightReceiver(LOOPBACK, Small(9), observers=(worker,)))
    sender = new_sender([receiver], observers=(trainer,))
    model = Small(1)
    nbytes, params = ModuleSource(model).manifest().nbytes, len(ModuleSource(model).manifest().params)
    for version in (3, 4):
        trainer.heard.clear()
        worker.heard.clear()
        sender.send(model, version=version)
        for role, heard in {"trainer": trainer.heard, "worker": worker.heard}.items():
            started, *progress, finished = heard
            common = {"role": role, "backend": "loopback", "version": version}
            assert started == TransferStarted(**common, nbytes=nbytes, params=params, workers=1)
            assert {type(event) for event in progress} == {TransferProgress}
            assert {(event.role, event.version, event.total) for event in progress} == {(role, version, nbytes)}
            done = [event.done for event in progress]
            assert done == sorted(done)
            assert done[-1] == nbytes
            assert type(finished) is TransferFinished
            assert (finished.version, finished.nbytes, finished.error) == (version, nbytes, None)
            assert finished.seconds > 0


def test_listeners_hear_of_a_failed_update_with_its_sentence(new_worker: Make, new_sender: Make) -> None:
    recorder = Recorder()
    worker = new_worker()
    worker.fail_with = OSError("full")
    sender = new_sender([worker], observers=(recorder,))
    with pytest.raises(TransferError) as caught:
        sender.send(Small(1))
    started, finished = recorder.heard[0], recorder.heard[-1]
    assert (type(started), type(finished)) == (TransferStarted, TransferFinished)
    assert finished.error == str(caught.value)


def test_workers_come_and_go_between_updates(new_worker: Make, new_sender: Make) -> None:
    workers = [new_worker() for _ in range(3)]
    a, b = Small(1), Small(2)
    sender = new_sender(workers[:2])
    sender.send(a)
    sender.add_worker(workers[2].receiver)
    assert sender.send(b).workers == ("worker 0", "worker 1", "worker 2")
    assert [worker.serves for worker in workers] == [(1, digest(b))] * 3
    sender.remove_worker(workers[0].receiver)
    assert sender.send(a).workers == ("worker 1", "worker 2")
    assert [worker.serves for worker in workers] == [(1, digest(b)), (2, digest(a)), (2, digest(a))]


def test_a_worker_that_is_there_twice_unknown_or_the_last_one_is_refused(new_worker: Make, new_sender: Make) -> None:
    worker, stranger = new_worker(), new_worker()
    sender = new_sender([worker])
    with pytest.raises(ConfigError, match="worker 0 is there already; name each worker once"):
        sender.add_worker(worker.receiver)
    with pytest.raises(ConfigError, match=r"There is no worker http://127\.0\.0\.1:1; there are worker 0"):
        sender.remove_worker("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="worker 0 is the last one; close the sender instead"):
        sender.remove_worker(worker.receiver)
    with pytest.raises(ConfigError, match="There is no worker"):
        sender.remove_worker(stranger.receiver)
    sender.send(Small(1))
    assert worker.serves == (0, digest(Small(1)))
