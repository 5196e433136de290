"""The worker's session: whatever a trainer does or fails to do, no torn version is ever served."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs
import pytest
import torch

from support.listeners import Recorder
from support.scripted import INIT, NAMES, STATES, Served, Worker, breaks, to_ready, to_received, to_updating
from weight_transfer import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    Manifest,
    ManifestMismatchError,
    ParallelConfig,
    ParamMeta,
    ReceiverState,
    TransferError,
    TransferFinished,
    TransferProgress,
    TransferStarted,
    TransferTimeoutError,
    WeightReceiver,
    hookimpl,
)
from weight_transfer.model.loading import destinations_of
from weight_transfer.session.awaited import AwaitedCalls
from weight_transfer.testing.actors import eventually
from weight_transfer.values.deadline import Deadline

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def new(script: Any) -> Iterator[Callable[..., Worker]]:
    """Make workers that are closed at the end."""
    workers: list[Worker] = []

    def _new(**arguments: Any) -> Worker:
        workers.append(Worker(script, **arguments))
        return workers[-1]

    yield _new
    for worker in workers:
        for engine in script.engines:
            engine.aborted.set()
        worker.receiver.close()


@pytest.fixture
def worker(new: Callable[..., Worker]) -> Worker:
    return new()


STATE_OF = {"received": "updating"}  # a receiver with all its bytes is still updating, to the outside


# The way that it should go.


def test_versions_go_from_a_to_b_and_back_to_a(worker: Worker) -> None:
    receiver = worker.receiver
    assert (receiver.state, receiver.version) == (ReceiverState.CREATED, None)
    worker.init()
    assert (receiver.state, receiver.version) == (ReceiverState.READY, None)
    for version, value in [(1, 1.0), (2, 2.0), ("again", 1.0)]:
        worker.start()
        assert (receiver.state, receiver.version) == (ReceiverState.UPDATING, None)
        worker.update(value, version)
        assert (receiver.state, receiver.version) == (ReceiverState.UPDATING, None)
        worker.finish()
        assert (receiver.state, receiver.version) == (ReceiverState.READY, version)
        assert worker.model.values == [value] * 3


@pytest.mark.parametrize("other", ["one", 2, "1"])
def test_finish_may_not_rename_the_version_that_was_announced(worker: Worker, other: int | str) -> None:
    worker.init()
    worker.start()
    worker.update(1.0, 1)
    with pytest.raises(LifecycleError, match=f"announced as version 1, not {other!r}"):
        worker.finish(other)
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.UPDATING, None)
    worker.finish(1)
    assert worker.receiver.version == 1


@pytest.mark.parametrize("version", [7, 0, -1, "7", "seven"])
def test_a_channel_that_turns_versions_into_text_may_finish_with_that(worker: Worker, version: int | str) -> None:
    worker.receiver.init_weight_transfer_engine(INIT | {"text_versions": True})
    worker.start()
    worker.update(1.0, version)
    for other in ("8", 8, "07", "7.0", " 7"):
        with pytest.raises(LifecycleError, match=f"announced as version {version!r}, not {other!r}"):
            worker.finish(other)
    worker.finish(str(version))
    assert repr(worker.receiver.version) == repr(version)
    worker.init()
    worker.start()
    worker.update(1.0, 9)
    with pytest.raises(LifecycleError, match="announced as version 9, not '9'"):
        worker.finish("9")


def test_a_version_of_0_is_a_version(worker: Worker) -> None:
    worker.init()
    worker.deliver(1.0, 0)
    assert worker.receiver.version == 0
    with worker.receiver.serving(timeout=1) as version:
        assert version == 0


def test_an_update_that_nobody_named_can_still_be_named(worker: Worker) -> None:
    worker.init()
    worker.start()
    worker.update(1.0, None)
    with pytest.raises(LifecycleError, match="the update has no version; name one"):
        worker.finish()
    worker.finish(7)
    assert worker.receiver.version == 7


def test_kernel_format_goes_past_the_models_own_loader(new: Callable[..., Worker]) -> None:
    loaded: list[str] = []
    worker = new(load_weights=lambda weights: loaded.extend(name for name, _ in weights))
    worker.init()
    worker.start()
    worker.update(1.0, 1, is_checkpoint_format=False)
    worker.finish()
    assert (loaded, worker.model.values) == ([], [1.0] * 3)
    worker.start()
    worker.update(2.0, 2)
    worker.finish()
    assert (loaded, worker.model.values) == ([*NAMES], [1.0] * 3)


@pytest.mark.parametrize("own_loader", [False, True])
def test_an_engine_may_write_in_place_only_if_the_loader_just_copies(
    new: Callable[..., Worker], own_loader: bool
) -> None:
    worker = new(load_weights=(lambda weights: None) if own_loader else None)
    offered: list[Any] = []

    def receive(engine: Any, info: Any, load_weights: Any) -> None:
        offered.append(destinations_of(load_weights))
        worker.script.load_all(engine, info, load_weights)

    worker.script.receive = receive
    worker.init()
    worker.deliver(1.0, 1)
    (targets,) = offered
    if own_loader:
        assert targets is None
    else:
        assert [targets[name] is worker.model.get_parameter(name) for name in NAMES] == [True] * 3


# Calls that come at the wrong time.

WRONG = [
    *((state, "start_weight_update") for state in ("created", "updating", "received", "failed", "closed")),
    *((state, "update_weights") for state in ("created", "ready", "received", "failed", "closed")),
    *((state, "finish_weight_update") for state in ("created", "ready", "updating", "failed", "closed")),
    ("closed", "init_weight_transfer_engine"),
]


def call(worker: Worker, method: str) -> None:
    {
        "init_weight_transfer_engine": worker.init,
        "start_weight_update": worker.start,
        "update_weights": lambda: worker.update(3.0, "wrong"),
        "finish_weight_update": lambda: worker.finish("wrong"),
    }[method]()


@pytest.mark.parametrize(("state", "method"), WRONG)
def test_a_call_at_the_wrong_time_is_refused_and_changes_nothing(worker: Worker, state: str, method: str) -> None:
    STATES[state](worker)
    before = worker.receiver.status(), worker.model.values
    with pytest.raises(LifecycleError) as caught:
        call(worker, method)
    assert (caught.value.method, caught.value.state) == (method, STATE_OF.get(state, state))
    assert str(caught.value).startswith(f"{method} cannot be called in state {STATE_OF.get(state, state)}: ")
    assert (worker.receiver.status(), worker.model.values) == before


@pytest.mark.parametrize(
    ("state", "method", "advice"),
    [
        ("created", "update_weights", "call init_weight_transfer_engine first"),
        ("ready", "update_weights", "call start_weight_update first"),
        ("updating", "start_weight_update", "finish or abort the running update first"),
        ("updating", "finish_weight_update", "its weights have not arrived; call update_weights first"),
        ("received", "update_weights", "this update has its weights already; finish it"),
        ("failed", "start_weight_update", "call init_weight_transfer_engine and send a full update"),
        ("closed", "start_weight_update", "this receiver is closed; create a new one"),
    ],
)
def test_the_refusal_says_what_to_call_instead(worker: Worker, state: str, method: str, advice: str) -> None:
    STATES[state](worker)
    with pytest.raises(LifecycleError) as caught:
        call(worker, method)
    assert advice in str(caught.value)


@pytest.mark.parametrize("state", [state for state in STATES if state != "closed"])
def test_init_and_a_full_update_lead_out_of_every_state_but_closed(worker: Worker, state: str) -> None:
    STATES[state](worker)
    worker.resync(5.0, "after")
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, "after")
    assert worker.model.values == [5.0] * 3
    assert worker.receiver.status()["error"] is None


def test_a_second_call_while_one_is_under_way_is_refused(worker: Worker) -> None:
    inside, leave = threading.Event(), threading.Event()

    def receive(engine: Any, info: Any, load_weights: Any) -> None:
        inside.set()
        assert leave.wait(20)
        worker.script.load_all(engine, info, load_weights)

    worker.script.receive = receive
    to_start = threading.Thread(target=lambda: worker.update(1.0, 1))
    worker.init()
    worker.start()
    to_start.start()
    assert inside.wait(20)
    for method in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        with pytest.raises(LifecycleError, match="update_weights is under way"):
            call(worker, method)
    leave.set()
    to_start.join(20)
    worker.finish()
    assert worker.receiver.version == 1


# Another trainer.


def test_a_trainer_that_joins_ends_the_update_of_another_one_at_once(worker: Worker) -> None:
    """That one may stand still; its deadline is 10 s."""
    inside, failures = threading.Event(), []

    def receive(engine: Any, _info: Any, load_weights: Any) -> None:
        load_weights([worker.script.weights[0]])
        inside.set()
        assert engine.aborted.wait(20)
        load_weights([worker.script.weights[1]])

    def update() -> None:
        with pytest.raises(TransferError) as failure:
            worker.update(1.0, 1, session="first")
        failures.append(failure.value)

    worker.script.receive = receive
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "first"})
    worker.receiver.start_weight_update("first")
    updating = threading.Thread(target=update)
    updating.start()
    assert inside.wait(20)
    since = time.monotonic()
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "second"})
    assert time.monotonic() - since < 5
    updating.join(20)
    assert "another trainer has taken this worker over" in str(failures[0])
    assert worker.receiver.state is ReceiverState.READY
    assert worker.model.values == [1.0, 0.0, 0.0]
    worker.script.receive = worker.script.load_all
    worker.receiver.start_weight_update("second")
    worker.update(2.0, 2, session="second")
    worker.receiver.finish_weight_update(2, "second")
    assert (worker.receiver.version, worker.model.values) == (2, [2.0] * 3)


def test_a_trainer_that_joins_ends_the_join_of_another_one_at_once(worker: Worker) -> None:
    inside = threading.Event()

    def join(_info: Any) -> None:
        worker.script.join = lambda _info: None
        inside.set()
        assert worker.engine.aborted.wait(20)
        raise OSError("it was aborted")

    def first() -> None:
        with pytest.raises(TransferError):
            worker.receiver.init_weight_transfer_engine(INIT | {"session": "first"})

    worker.script.join = join
    joining = threading.Thread(target=first)
    joining.start()
    assert inside.wait(20)
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "second"})
    joining.join(20)
    assert worker.receiver.status()["state"] == "ready"
    worker.receiver.start_weight_update("second")


def test_a_wait_for_a_version_ends_in_time_though_an_engine_takes_long_to_close(worker: Worker) -> None:
    worker.init()
    worker.start()
    worker.update(1.0, 1)
    update = worker.receiver._update
    assert update is not None
    update.deadline = Deadline(0.1)
    closes = threading.Event()
    worker.engine.shutdown = lambda: closes.wait(20)
    since = time.monotonic()
    with pytest.raises(TransferTimeoutError), worker.receiver.serving(0.5):
        pass
    assert time.monotonic() - since < 3
    closes.set()


# Aborting.


@pytest.mark.parametrize(
    ("state", "after", "version"),
    [
        ("created", "created", None),
        ("ready", "created", "old"),
        ("updating", "created", "old"),
        ("received", "failed", None),
        ("failed", "failed", None),
        ("closed", "closed", "old"),
    ],
)
def test_abort_keeps_the_old_version_unless_the_model_was_touched(
    worker: Worker, state: str, after: str, version: str | None
) -> None:
    STATES[state](worker)
    for _ in range(2):
        worker.receiver.abort_weight_update("the test says so")
        assert (str(worker.receiver.state), worker.receiver.version) == (after, version)


@pytest.mark.parametrize(("touched", "after", "version"), [(0, "created", "old"), (1, "failed", None)])
@pytest.mark.parametrize("ending", ["abort_weight_update", "leave"])
def test_whoever_ends_a_running_update_from_another_thread_finds_it_ended(
    worker: Worker, ending: str, touched: int, after: str, version: str | None
) -> None:
    to_updating(worker)
    inside, errors = threading.Event(), []

    def receive(engine: Any, _info: Any, load_weights: Any) -> None:
        load_weights(worker.script.weights[:touched]) if touched else None
        inside.set()
        assert engine.aborted.wait(20)
        load_weights(worker.script.weights[touched:])

    def update() -> None:
        try:
            worker.update(2.0, "new")
        except TransferError as error:
            errors.append(error)

    worker.script.receive = receive
    updating = threading.Thread(target=update)
    updating.start()
    assert inside.wait(20)
    getattr(worker.receiver, ending)("the trainer was tired")
    assert (str(worker.receiver.state), worker.receiver.version) == (after, version)
    assert worker.model.values == [2.0] * touched + [1.0] * (3 - touched)
    updating.join(20)
    (error,) = errors
    assert type(error) is TransferError
    assert str(error) == "The update was aborted: the trainer was tired."
    assert (error.backend, error.phase, error.version) == ("scripted", "update", "new")
    worker.script.receive = worker.script.load_all
    worker.resync(3.0, "later")
    assert (worker.receiver.version, worker.model.values) == ("later", [3.0] * 3)


def test_abort_of_an_engine_that_does_not_listen_is_a_timeout(new: Callable[..., Worker]) -> None:
    worker = new(timeout=1.0)
    worker.init()
    worker.start()
    inside, leave = threading.Event(), threading.Event()

    def receive(_engine: Any, _info: Any, load_weights: Any) -> None:
        inside.set()
        assert leave.wait(20)

    def update() -> None:
        with pytest.raises(TransferError):
            worker.update(2.0, "new")

    worker.script.receive = receive
    updating = threading.Thread(target=update)
    updating.start()
    assert inside.wait(20)
    with pytest.raises(TransferTimeoutError, match="abort_weight_update waited for update_weights to end"):
        worker.receiver.abort_weight_update()
    leave.set()
    updating.join(20)
    assert worker.receiver.state is ReceiverState.CREATED


def test_an_update_that_waits_for_readers_can_be_aborted(worker: Worker) -> None:
    to_ready(worker)
    errors: list[TransferError] = []

    def start() -> None:
        try:
            worker.start()
        except TransferError as error:
            errors.append(error)

    with worker.receiver.serving():
        starting = threading.Thread(target=start)
        starting.start()
        assert eventually(lambda: worker.receiver.state is ReceiverState.UPDATING, 20)
        worker.receiver.abort_weight_update("never mind")
        starting.join(20)
        assert "never mind" in str(errors[0])
        assert worker.receiver.version == "old"
    worker.resync(2.0, "new")
    assert worker.receiver.version == "new"


# Failures.

FAILURES_BEFORE = {
    "an unknown key": (lambda worker: worker.update(2.0, "new", versoin=1), ConfigError, "did you mean 'version'?"),
    "a wrong type": (lambda worker: worker.update(2.0, "new", timeout="soon"), ConfigError, "timeout: "),
    "no manifest": (
        lambda worker: worker.receiver.update_weights({"timeout": 1}),
        ConfigError,
        "manifest: this key is required",
    ),
    "another shape": (
        lambda worker: worker.receiver.update_weights(
            {"timeout": 1, "manifest": Manifest([ParamMeta(name, "float32", (3, 4)) for name in NAMES]).to_wire()}
        ),
        ManifestMismatchError,
        "first: float32 [3, 4] was sent, but the worker's model has float32 [4, 3]",
    ),
    "a missing parameter": (
        lambda worker: worker.receiver.update_weights(
            {"timeout": 1, "manifest": Manifest([ParamMeta(name, "float32", (4, 3)) for name in NAMES[1:]]).to_wire()}
        ),
        ManifestMismatchError,
        "'first' is missing from the update",
    ),
    "an unknown digest": (
        lambda worker: worker.update(2.0, "new", manifest={"digest": "00"}),
        ManifestMismatchError,
        "'manifest'",
    ),
}


@pytest.mark.parametrize("failure", FAILURES_BEFORE)
def test_an_update_that_cannot_fit_leaves_the_model_the_version_and_the_engine_as_they_were(
    worker: Worker, failure: str
) -> None:
    to_updating(worker)
    act, kind, words = FAILURES_BEFORE[failure]
    with pytest.raises(kind) as caught:
        act(worker)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, "old")
    assert worker.receiver.status()["error"] == str(caught.value)
    assert worker.model.values == [1.0] * 3
    worker.deliver(2.0, "new")  # without another init
    assert worker.model.values == [2.0] * 3
    assert len(worker.script.engines) == 1


def test_an_engine_that_fails_before_the_first_byte_leaves_the_old_version_served(worker: Worker) -> None:
    to_updating(worker)
    breaks(worker, 0)
    with pytest.raises(TransferError):
        worker.update(2.0, "new")
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.CREATED, "old")
    assert worker.model.values == [1.0] * 3
    with worker.receiver.serving(timeout=1) as version:
        assert version == "old"
    worker.resync(2.0, "new")
    assert (worker.receiver.version, worker.model.values) == ("new", [2.0] * 3)


@pytest.mark.parametrize("parameters", [1, 2, 3])
def test_an_engine_that_fails_after_the_first_byte_leaves_no_version_until_a_full_update(
    worker: Worker, parameters: int
) -> None:
    to_updating(worker)
    engine = worker.engine
    breaks(worker, parameters)
    with pytest.raises(TransferError):
        worker.update(2.0, "new")
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.FAILED, None)
    assert engine.shutdowns == 1
    with pytest.raises(TransferTimeoutError, match="waiting for a version to serve"):
        worker.receiver.serving(timeout=0.01).__enter__()
    worker.init()
    assert worker.receiver.version is None, "joining again does not mend the model"
    worker.deliver(1.0, "mended")
    assert worker.model.values == [1.0] * 3
    assert worker.receiver.version == "mended"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError("the cable was pulled"), TransferError),
        (TimeoutError("no answer"), TransferTimeoutError),
        (HandshakeError("Who are you?"), HandshakeError),
    ],
)
def test_foreign_exceptions_of_an_engine_become_transfer_errors_with_their_cause(
    worker: Worker, raised: Exception, kind: type[TransferError]
) -> None:
    to_updating(worker)
    breaks(worker, 1, raised)
    with pytest.raises(kind) as caught:
        worker.update(2.0, "new")
    assert type(caught.value) is kind
    if isinstance(raised, HandshakeError):
        assert caught.value is raised
    else:
        assert caught.value.cause == f"{type(raised).__name__}: {raised}"
        assert (caught.value.backend, caught.value.phase, caught.value.version) == ("scripted", "update", "new")
        assert caught.value.__cause__ is raised
    assert worker.receiver.status()["error"] == str(caught.value)


@pytest.mark.parametrize("parameter", NAMES)
def test_a_loader_that_raises_leaves_no_version_for_it_may_have_written(
    new: Callable[..., Worker], parameter: str
) -> None:
    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        if weights[0][0] == parameter:
            raise KeyError("layers.3")

    worker = new(load_weights=load)
    worker.init()
    worker.start()
    with pytest.raises(TransferError) as caught:
        worker.update(2.0, "new")
    assert caught.value.cause == "KeyError: 'layers.3'"
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.FAILED, None)


ENGINE_FAULTS = {
    "a parameter twice": (lambda w: [*w[:2], w[0], w[2]], "Parameter 'first' arrived twice or is not in the manifest"),
    "an extra parameter": (
        lambda w: [*w, ("fourth", w[0][1])],
        "Parameter 'fourth' arrived twice or is not in the manifest",
    ),
    "a missing parameter": (lambda w: w[:2], "1 of 3 parameters did not arrive, such as 'third'"),
    "another shape": (
        lambda w: [w[0], (w[1][0], w[1][1].t()), w[2]],
        "second: float32 [4, 3] arrived as torch.float32 [3, 4]",
    ),
    "another dtype": (
        lambda w: [*w[:2], (w[2][0], w[2][1].double())],
        "third: float32 [4, 3] arrived as torch.float64 [4, 3]",
    ),
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_an_engine_that_delivers_something_else_than_the_manifest_is_caught(worker: Worker, fault: str) -> None:
    to_updating(worker)
    change, words = ENGINE_FAULTS[fault]

    def receive(_engine: Any, _info: Any, load_weights: Any) -> None:
        for item in change(worker.script.weights):
            load_weights([item])

    worker.script.receive = receive
    with pytest.raises(ManifestMismatchError) as caught:
        worker.update(2.0, "new")
    assert words in str(caught.value)
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.FAILED, None)


# Joining.


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError("no route"), TransferError),
        (TimeoutError("no answer"), TransferTimeoutError),
        (HandshakeError("No."), HandshakeError),
    ],
)
def test_a_failed_join_closes_the_engine_and_keeps_the_version(
    worker: Worker, raised: Exception, kind: type[TransferError]
) -> None:
    to_ready(worker)
    old = worker.engine

    def join(_info: Any) -> None:
        raise raised

    worker.script.join = join
    with pytest.raises(kind) as caught:
        worker.init()
    assert type(caught.value) is kind
    assert (caught.value.phase or "init") == "init"
    assert (old.shutdowns, worker.engine.shutdowns) == (1, 1)
    assert worker.engine is not old
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.CREATED, "old")
    assert worker.receiver.status()["error"] == str(caught.value)
    worker.script.join = lambda info: None
    worker.resync(2.0, "new")
    assert worker.receiver.version == "new"


def test_a_wrong_init_info_names_the_field_and_closes_the_engine(worker: Worker) -> None:
    with pytest.raises(
        ConfigError, match=r"init_info of Worker: unknown key 'rank_ofset'; did you mean 'rank_offset'\?"
    ):
        worker.receiver.init_weight_transfer_engine({**INIT, "rank_ofset": 1})
    assert worker.receiver.state is ReceiverState.CREATED
    assert worker.engine.shutdowns == 1


def test_a_second_init_replaces_the_engine_and_keeps_the_version(worker: Worker) -> None:
    to_ready(worker)
    first = worker.engine
    worker.init()
    assert first.shutdowns == 1
    assert worker.engine is not first
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, "old")


@pytest.mark.parametrize(("state", "version"), [("updating", "old"), ("received", None)])
def test_an_init_during_an_update_ends_it(worker: Worker, state: str, version: str | None) -> None:
    STATES[state](worker)
    worker.init()
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, version)


def test_what_was_sent_once_is_forgotten_at_init(worker: Worker) -> None:
    to_ready(worker)
    manifest = Manifest(ParamMeta(name, "float32", (4, 3)) for name in NAMES)
    both, digest = {"digest": manifest.digest, "value": manifest.to_wire()}, {"digest": manifest.digest}
    for wire in (both, digest):
        worker.start()
        worker.update(2.0, "new", manifest=wire)
        worker.finish()
    worker.init()
    worker.start()
    with pytest.raises(ManifestMismatchError):
        worker.update(2.0, "new", manifest=digest)


# Deadlines.


def test_weights_that_come_after_the_deadline_are_not_loaded(worker: Worker, clock: Any) -> None:
    to_updating(worker)

    def receive(_engine: Any, _info: Any, load_weights: Any) -> None:
        load_weights(worker.script.weights[:1])
        clock.advance(5.1)
        load_weights(worker.script.weights[1:])

    worker.script.receive = receive
    with pytest.raises(TransferTimeoutError, match="The deadline of 5 s passed while receiving weights"):
        worker.update(2.0, "new", timeout=5)
    assert worker.model.values == [2.0, 1.0, 1.0]
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.FAILED, None)


def test_an_engine_that_returns_after_the_deadline_has_failed(worker: Worker, clock: Any) -> None:
    to_updating(worker)

    def receive(engine: Any, info: Any, load_weights: Any) -> None:
        worker.script.load_all(engine, info, load_weights)
        clock.advance(5.1)

    worker.script.receive = receive
    with pytest.raises(TransferTimeoutError):
        worker.update(2.0, "new", timeout=5)
    assert worker.receiver.version is None


def test_an_abandoned_update_ends_at_its_deadline_and_the_untouched_model_is_served_again(
    worker: Worker, clock: Any
) -> None:
    to_updating(worker)
    clock.advance(9.9)
    assert worker.receiver.status()["state"] == "updating"
    clock.advance(0.2)
    status = worker.receiver.status()
    assert (status["state"], status["version"]) == ("ready", "old")
    assert "did not go on with the update within its deadline" in status["error"]
    worker.deliver(2.0, "new")
    assert worker.receiver.version == "new"


def test_an_abandoned_update_that_touched_the_model_ends_with_no_version(worker: Worker, clock: Any) -> None:
    to_received(worker)
    clock.advance(10.1)
    status = worker.receiver.status()
    assert (status["state"], status["version"]) == ("failed", None)
    with pytest.raises(LifecycleError):
        worker.finish()
    worker.resync(3.0, "later")
    assert worker.receiver.version == "later"


# Serving.


def test_an_update_waits_until_nobody_samples_any_more(worker: Worker) -> None:
    to_ready(worker)
    started = threading.Event()

    def start() -> None:
        worker.start()
        started.set()

    starting = threading.Thread(target=start)
    with worker.receiver.serving(), worker.receiver.serving() as version:
        assert version == "old"
        starting.start()
        assert eventually(lambda: worker.receiver.state is ReceiverState.UPDATING, 20)
        assert not started.wait(0.15)
    assert started.wait(20)
    starting.join(20)
    worker.update(2.0, "new")
    worker.finish()
    assert worker.receiver.version == "new"


def test_who_wants_to_sample_during_an_update_waits_for_the_new_version(worker: Worker) -> None:
    to_updating(worker)
    got: list[Any] = []
    waiting = threading.Event()

    def sample() -> None:
        waiting.set()
        with worker.receiver.serving() as version:
            got.append((version, worker.model.values))

    sampling = threading.Thread(target=sample)
    sampling.start()
    assert waiting.wait(20)
    worker.update(2.0, "new")
    assert got == []
    worker.finish()
    sampling.join(20)
    assert got == [("new", [2.0] * 3)]


def test_somebody_who_samples_too_long_is_a_timeout_and_the_version_stays_served(worker: Worker) -> None:
    to_ready(worker)
    patient = worker.receiver.config
    worker.receiver.config = attrs.evolve(patient, timeout=0.1)
    with worker.receiver.serving():
        with pytest.raises(TransferTimeoutError, match="waiting for the sampling of the old version to end"):
            worker.start()
        assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.READY, "old")
    worker.receiver.config = patient
    worker.deliver(2.0, "new")
    assert worker.receiver.version == "new"


def test_waiting_for_a_version_has_a_deadline_and_says_where_the_receiver_stands(worker: Worker) -> None:
    with pytest.raises(TransferTimeoutError, match=r"passed while waiting for a version to serve \(state created\)"):
        worker.receiver.serving(timeout=0.01).__enter__()


def test_waiting_for_a_version_of_a_receiver_that_closes_ends_at_once(worker: Worker) -> None:
    errors: list[Exception] = []
    waiting = threading.Event()

    def sample() -> None:
        waiting.set()
        try:
            with worker.receiver.serving(timeout=20):
                errors.append(AssertionError("there is no version"))
        except LifecycleError as error:
            errors.append(error)

    sampling = threading.Thread(target=sample)
    sampling.start()
    assert waiting.wait(20)
    worker.receiver.close()
    sampling.join(10)
    (error,) = errors
    assert "closed" in str(error)


def test_an_exception_while_sampling_does_not_hold_up_the_next_update(worker: Worker) -> None:
    to_ready(worker)
    with pytest.raises(ZeroDivisionError), worker.receiver.serving():
        raise ZeroDivisionError
    worker.deliver(2.0, "new")
    assert worker.receiver.version == "new"


# Leaving.


@pytest.mark.parametrize(
    ("state", "after", "version"),
    [
        ("created", "created", None),
        ("ready", "created", "old"),
        ("updating", "created", "old"),
        ("received", "failed", None),
        ("failed", "failed", None),
    ],
)
def test_a_worker_may_leave_its_trainer_and_be_initialised_again(
    worker: Worker, state: str, after: str, version: str | None
) -> None:
    STATES[state](worker)
    for _ in range(2):
        worker.receiver.leave()
        assert (str(worker.receiver.state), worker.receiver.version) == (after, version)
        assert [engine.shutdowns for engine in worker.script.engines] == [1] * len(worker.script.engines)
    with pytest.raises(LifecycleError, match="call init_weight_transfer_engine"):
        worker.start()
    for value in (2.0, 1.0):
        worker.resync(value, f"version {value}")
        worker.receiver.leave()
        assert (worker.receiver.version, worker.model.values) == (f"version {value}", [value] * 3)
        with worker.receiver.serving(timeout=1) as served:
            assert served == f"version {value}"


def test_a_worker_leaves_whichever_trainer_it_has_joined(worker: Worker) -> None:
    worker.receiver.init_weight_transfer_engine(INIT | {"session": "s"})
    worker.receiver.leave()
    assert worker.receiver.state is ReceiverState.CREATED
    worker.receiver.init_weight_transfer_engine(INIT)
    worker.deliver(1.0, 1)
    assert worker.receiver.version == 1


def test_a_closed_worker_has_nobody_to_leave(worker: Worker) -> None:
    STATES["closed"](worker)
    with pytest.raises(LifecycleError, match="this receiver is closed; create a new one") as caught:
        worker.receiver.leave()
    assert (caught.value.method, caught.value.state) == ("leave", "closed")


def test_leaving_from_another_thread_ends_a_join(worker: Worker) -> None:
    to_ready(worker)
    inside = threading.Event()

    def join(_info: Any) -> None:
        inside.set()
        assert worker.engine.aborted.wait(20)
        raise OSError("nobody came")

    def init() -> None:
        with pytest.raises(TransferError, match="OSError: nobody came"):
            worker.init()

    worker.script.join = join
    joining = threading.Thread(target=init)
    joining.start()
    assert inside.wait(20)
    worker.receiver.leave()
    joining.join(20)
    assert (worker.receiver.state, worker.receiver.version) == (ReceiverState.CREATED, "old")
    worker.script.join = lambda info: None
    worker.resync(2.0, "new")
    assert worker.receiver.version == "new"


# Closing, and telling others.


@pytest.mark.parametrize("state", STATES)
def test_close_can_be_called_in_any_state_and_twice(worker: Worker, state: str) -> None:
    STATES[state](worker)
    values = worker.model.values
    for _ in range(2):
        worker.receiver.close()
        assert worker.receiver.state is ReceiverState.CLOSED
    assert [engine.shutdowns for engine in worker.script.engines] == [1] * len(worker.script.engines)
    assert worker.model.values == values


def test_close_ends_a_running_update(worker: Worker) -> None:
    to_updating(worker)
    inside, errors = threading.Event(), []

    def receive(engine: Any, _info: Any, load_weights: Any) -> None:
        inside.set()
        assert engine.aborted.wait(20)
        load_weights(worker.script.weights)

    def update() -> None:
        try:
            worker.update(2.0, "new")
        except TransferError as error:
            errors.append(str(error))

    worker.script.receive = receive
    updating = threading.Thread(target=update)
    updating.start()
    assert inside.wait(20)
    worker.receiver.close()
    updating.join(20)
    assert errors == ["The update was aborted: the worker is closing."]
    assert worker.model.values == [1.0] * 3


def test_a_receiver_closes_itself_at_the_end_of_a_with_block(worker: Worker) -> None:
    block: AbstractContextManager[WeightReceiver] = worker.receiver
    with block as receiver:
        worker.init()
        assert receiver is worker.receiver
    assert receiver.state is ReceiverState.CLOSED
    assert worker.engine.shutdowns == 1


@pytest.mark.parametrize("state", STATES)
def test_the_status_is_json_in_every_state(worker: Worker, state: str) -> None:
    STATES[state](worker)
    status = json.loads(json.dumps(worker.receiver.status()))
    told = {"state", "version", "versions", "published", "committed", "updates", "digests", "prepared", "lease"}
    assert set(status) == told | {"backend", "device", "workers", "progress", "error", "id"}
    assert status["progress"] == ({"done": 144, "total": 144} if state == "received" else None)
    assert (status["state"], status["backend"], status["workers"]) == (STATE_OF.get(state, state), "scripted", 1)
    assert (status["error"] is not None) is (state == "failed")


def test_a_model_may_begin_with_a_version(new: Callable[..., Worker]) -> None:
    worker = new(version=5)
    with worker.receiver.serving(timeout=1) as version:
        assert version == 5
    assert abs(worker.receiver.status()["published"] - time.time()) < 60
    worker.init()
    worker.deliver(1.0, 6)
    assert worker.receiver.version == 6


def test_listeners_hear_of_the_start_the_bytes_and_the_end_in_this_order(new: Callable[..., Worker]) -> None:
    recorder = Recorder()
    worker = new(observers=(recorder,))
    worker.init()
    assert recorder.heard == []
    worker.deliver(1.0, 7)
    started, *progress, finished = recorder.heard
    common = {"role": "worker", "backend": "scripted", "version": 7}
    assert started == TransferStarted(**common, nbytes=144, params=3, workers=1)
    assert all(type(event) is TransferProgress and event.total == 144 for event in progress)
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert progress[-1].done == 144
    assert finished == TransferFinished(**common, nbytes=144, seconds=finished.seconds, phases=finished.phases)
    assert list(finished.phases) == ["start", "plan", "wire", "load", "wait", "commit"]
    assert 0 < sum(finished.phases.values()) <= finished.seconds < 20


def test_listeners_hear_of_a_failure_with_its_sentence(new: Callable[..., Worker]) -> None:
    recorder = Recorder()
    worker = new(observers=(recorder,))
    worker.init()
    worker.start()
    breaks(worker, 2)
    with pytest.raises(TransferError) as caught:
        worker.update(2.0, 8)
    assert type(recorder.heard[0]) is TransferStarted
    finished = recorder.heard[-1]
    assert type(finished) is TransferFinished
    assert (finished.version, finished.error) == (8, str(caught.value))


def test_a_listener_that_fails_does_not_fail_the_update(new: Callable[..., Worker]) -> None:
    class Failing:
        @hookimpl
        def weight_transfer_progress(self, event: Any) -> None:
            raise RuntimeError("the dashboard is down")

    worker = new(observers=(Failing(),))
    worker.init()
    worker.deliver(1.0, 1)
    assert (worker.receiver.version, worker.model.values) == (1, [1.0] * 3)


@pytest.mark.parametrize("on_meta", [(), ("first",), ("first", "second")])
def test_a_place_among_ranks_that_names_no_device_takes_that_of_the_first_weight_with_memory(
    on_meta: tuple[str, ...],
) -> None:
    model = Served()
    for name in on_meta:
        setattr(model, name, torch.nn.Parameter(torch.empty(4, 3, device="meta")))
    parallel = ParallelConfig(rank=1, world_size=2)
    with WeightReceiver({"backend": "loopback"}, model, parallel_config=parallel) as receiver:
        assert receiver.parallel_config == ParallelConfig(rank=1, world_size=2, device="cpu")


def test_a_model_without_memory_takes_the_device_that_is_given_and_no_other() -> None:
    model = Served().to("meta")
    model.register_buffer("scale", torch.empty(3, device="meta"))
    for parallel in (None, ParallelConfig(rank=1, world_size=2)):
        with pytest.raises(ConfigError, match=r"all on the meta device.*ParallelConfig\(device="):
            WeightReceiver({"backend": "loopback"}, model, parallel_config=parallel)
    with WeightReceiver({"backend": "loopback"}, model, parallel_config=ParallelConfig(device="cpu")) as receiver:
        assert receiver.parallel_config.device == "cpu"
    with WeightReceiver({"backend": "loopback"}, torch.nn.Identity()) as receiver:
        assert receiver.parallel_config.device == "cpu"


# The same calls for asyncio.

AWAITED = sorted(
    name for name, each in vars(AwaitedCalls).items() if name[0] == "a" and inspect.iscoroutinefunction(each)
)


@pytest.mark.parametrize("name", AWAITED)
def test_a_call_for_asyncio_takes_what_the_call_does(name: str) -> None:
    awaited, call = (inspect.signature(getattr(WeightReceiver, each)) for each in (name, name.removeprefix("a")))
    assert awaited == call


def test_versions_go_from_a_to_b_and_back_to_a_while_the_loop_goes_on(worker: Worker) -> None:
    async def main() -> None:
        async with worker.receiver as receiver:
            await receiver.ainit_weight_transfer_engine(dict(INIT))
            for version, value in enumerate((1.0, 2.0, 1.0)):
                await receiver.astart_weight_update()
                await receiver.aupdate_weights(worker.info(value, version))
                await receiver.afinish_weight_update(version)
                assert (receiver.version, worker.model.values) == (version, [value] * 3)
            await receiver.aleave()

    asyncio.run(main())
    assert worker.receiver.state is ReceiverState.CLOSED


def test_a_task_that_is_cancelled_in_an_update_has_it_aborted(worker: Worker) -> None:
    to_updating(worker)
    inside, info = threading.Event(), worker.info(2.0, "new")

    def receive(engine: Any, _info: Any, load_weights: Any) -> None:
        inside.set()
        assert engine.aborted.wait(20)
        load_weights(worker.script.weights)

    worker.script.receive = receive

    async def main() -> None:
        updating = asyncio.create_task(worker.receiver.aupdate_weights(info))
        assert await asyncio.to_thread(inside.wait, 20)
        updating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await updating

    asyncio.run(main())
    assert (str(worker.receiver.state), worker.receiver.version) == ("created", "old")
    assert worker.model.values == [1.0] * 3
