"""Holding a version still: on threads, in tasks, inside each other, and never on an event loop that it would block."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from torch import nn

from support.models import LOOPBACK, digest, model
from weight_transfer import (
    ConfigError,
    LifecycleError,
    ReceiverState,
    TransferError,
    TransferTimeoutError,
    WeightReceiver,
    WeightSender,
)
from weight_transfer.session import serving
from weight_transfer.testing.actors import eventually

pytestmark = pytest.mark.timeout(60)


class Pair:
    """A sender and a receiver of one process."""

    def __init__(self, **arguments: Any) -> None:
        self.model = model()
        self.receiver = WeightReceiver(LOOPBACK, self.model, **arguments)
        self.sender = WeightSender(LOOPBACK, [self.receiver])

    def send_aside(self, value: float) -> threading.Thread:
        """Send on a thread, and return once the update waits for samplers."""
        thread = threading.Thread(target=lambda: self.sender.send(model(value)), daemon=True)
        thread.start()
        assert eventually(lambda: self.receiver.state is ReceiverState.UPDATING, 10)
        return thread


@pytest.fixture
def pair() -> Iterator[Pair]:
    result = Pair()
    result.sender.send(model(1.0))
    yield result
    result.sender.close()
    result.receiver.close()


def test_a_block_inside_a_block_does_not_wait_for_the_update_that_waits_for_it(pair: Pair) -> None:
    with pair.receiver.serving() as outer:
        sending = pair.send_aside(2.0)
        for _ in range(2):
            with pair.receiver.serving(timeout=5) as inner:
                assert inner == outer == 0
                assert digest(pair.model) == digest(model(1.0))
        sending.join(0.2)
        assert sending.is_alive(), "the update waits for the outer block"
    sending.join(10)
    with pair.receiver.serving() as version:
        assert (version, digest(pair.model)) == (1, digest(model(2.0)))


def test_another_thread_is_not_inside_and_waits(pair: Pair) -> None:
    got: list[Any] = []

    def sample() -> None:
        with pair.receiver.serving() as version:
            got.append(version)

    with pair.receiver.serving():
        sending = pair.send_aside(2.0)
        sampling = threading.Thread(target=sample)
        sampling.start()
        sampling.join(0.3)
        assert got == []
    sending.join(10)
    sampling.join(10)
    assert got == [1]


def test_what_is_started_inside_a_block_is_inside_until_the_block_is_left(pair: Pair) -> None:
    async def main() -> None:
        left = asyncio.Event()

        async def later() -> Any:
            await left.wait()
            async with pair.receiver.aserving() as version:
                return version

        def on_a_thread() -> Any:
            with pair.receiver.serving(timeout=5) as version:
                return version

        async with pair.receiver.aserving():
            outliving = asyncio.create_task(later())
            sending = pair.send_aside(2.0)
            assert await asyncio.to_thread(on_a_thread) == 0
            async with pair.receiver.aserving(timeout=5) as version:
                assert version == 0
        await asyncio.to_thread(sending.join)
        left.set()
        assert await outliving == 1

    asyncio.run(main())


def test_many_tasks_wait_while_the_loop_goes_on_and_get_the_new_version(pair: Pair) -> None:
    async def main() -> None:
        async with pair.receiver.aserving():
            sending = pair.send_aside(2.0)
            waiting = [asyncio.create_task(_outside(pair.receiver)) for _ in range(200)]
            for _ in range(50):  # the loop goes on
                await asyncio.sleep(0.001)
            assert not any(task.done() for task in waiting)
        assert set(await asyncio.wait_for(asyncio.gather(*waiting), 20)) == {1}
        await asyncio.to_thread(sending.join)

    asyncio.run(main())
    assert digest(pair.model) == digest(model(2.0))


def test_a_cancelled_wait_leaves_nothing_behind(pair: Pair) -> None:
    async def main() -> None:
        with pair.receiver.serving():
            sending = pair.send_aside(2.0)
            waiting = asyncio.create_task(_outside(pair.receiver))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await asyncio.to_thread(sending.join)
        assert pair.receiver._served.samplers == []
        assert pair.receiver._changed._wakers == []

    asyncio.run(main())


async def _outside(receiver: WeightReceiver) -> Any:
    serving._mine.set(())  # as in a request that the block knows nothing of
    async with receiver.aserving() as version:
        return version


def test_on_an_event_loop_serving_works_if_it_need_not_wait_and_else_says_what_to_use(pair: Pair) -> None:
    fresh = WeightReceiver(LOOPBACK, model())

    async def main() -> None:
        with pair.receiver.serving() as version:
            assert version == 0
        with pytest.raises(LifecycleError, match=r"would block the event loop .* `async with receiver.aserving\(\)`"):
            fresh.serving().__enter__()

    asyncio.run(main())


def test_waiting_in_a_task_has_a_deadline() -> None:
    async def main() -> None:
        with pytest.raises(TransferTimeoutError, match=r"waiting for a version to serve \(state created\)"):
            async with WeightReceiver(LOOPBACK, model()).aserving(timeout=0.05):
                pass

    asyncio.run(main())


@pytest.mark.parametrize("waits", [False, True])
def test_a_closed_receiver_serves_nothing(pair: Pair, waits: bool) -> None:
    receiver = WeightReceiver(LOOPBACK, model()) if waits else pair.receiver
    receiver.close()
    with pytest.raises(LifecycleError, match="this receiver is closed; create a new one"):
        receiver.serving().__enter__()
    with pytest.raises(LifecycleError, match="this receiver is closed; create a new one"):
        asyncio.run(receiver.aserving().__aenter__())


def test_long_waits_are_logged_with_whom_they_wait_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("serving", "calls"):
        monkeypatch.setattr(f"weight_transfer.session.{module}.LONG", 0.05)
    with caplog.at_level(logging.WARNING):
        holding = threading.current_thread().name
        with pair.receiver.serving():
            sending = pair.send_aside(2.0)
            assert eventually(lambda: "waiting for worker 0 in phase start" in caplog.text, 10)
            assert eventually(lambda: f"an update waits for {holding} to leave serving()" in caplog.text, 10)
            waiting = threading.Thread(target=lambda: pair.receiver.serving().__enter__(), name="a sampler")
            waiting.start()
            assert eventually(lambda: "a sampler is waiting for a version to serve (state updating)" in caplog.text, 10)
        sending.join(10)
        waiting.join(10)


def test_a_sampler_that_does_not_let_go_is_named(pair: Pair) -> None:
    receiver = WeightReceiver(LOOPBACK, model())
    with WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(model(1.0))
        _make_hasty(receiver)
        with receiver.serving(), pytest.raises(TransferTimeoutError) as caught:
            sender.send(model(2.0))
    assert f"{threading.current_thread().name} still in serving(); let a block be one batch" in str(caught.value)


def _make_hasty(receiver: WeightReceiver) -> None:
    """Have the next update wait for samplers for a moment only."""
    receiver.config = attrs.evolve(receiver.config, timeout=0.2)


def test_of_many_samplers_some_are_named() -> None:
    receiver = WeightReceiver(LOOPBACK, model())

    async def sample(number: int) -> None:
        async with receiver.aserving():
            holding.release()
            await asyncio.to_thread(failed.wait, 10)

    async def sample_together() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(sample(number), name=f"sampler {number}")

    holding, failed = threading.Semaphore(0), threading.Event()
    with WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(model(1.0))
        _make_hasty(receiver)
        samplers = threading.Thread(target=asyncio.run, args=(sample_together(),))
        samplers.start()
        for _ in range(5):
            assert holding.acquire(timeout=10)
        with pytest.raises(TransferTimeoutError, match=r"sampler 0, sampler 1, sampler 2 and 2 more still in serving"):
            sender.send(model(2.0))
        failed.set()
        samplers.join(10)


class Exiting:
    """A loader that raises what would end a thread, or the process."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self, _weights: object) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()])
def test_a_loader_that_exits_fails_the_update_and_nothing_else(error: BaseException) -> None:
    loader = Exiting(error)
    pair = Pair(load_weights=loader)
    with pytest.raises(TransferError, match="The worker failed in phase update") as caught:
        pair.sender.send(model(1.0))
    assert caught.value.cause is not None
    assert caught.value.cause.startswith(type(error).__name__)
    loader.error = None
    assert pair.sender.send(model(1.0)).version == 0


@pytest.mark.parametrize("wrong", [None, "model", 3, nn.Linear])
def test_a_model_that_is_none_is_a_sentence(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"model: expected the nn\.Module that serves, got \w+"):
        WeightReceiver(LOOPBACK, wrong)


def test_everybody_says_what_they_are(pair: Pair) -> None:
    assert repr(pair.receiver) == "<WeightReceiver loopback: ready, version 0>"
    assert repr(pair.sender) == "<WeightSender loopback to worker 0, version 0>"
    pair.sender.close()
    assert repr(pair.sender) == "<WeightSender loopback closed, version 0>"


@pytest.mark.parametrize("failed", [False, True])
def test_what_was_closed_keeps_no_model(failed: bool) -> None:
    served, trained = model(), model(1.0)
    loader = Exiting(OSError("full")) if failed else None
    receiver = WeightReceiver(LOOPBACK, served, load_weights=loader, process_weights_after_loading=Noted())
    sender = WeightSender(LOOPBACK, [receiver])
    try:
        sender.send(trained)
    except TransferError:
        assert failed
    sender.close()
    receiver.close()
    models = [weakref.ref(served), weakref.ref(trained)]
    del served, trained, loader
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert (sender.version, receiver.state) == (None if failed else 0, ReceiverState.CLOSED)


class Noted:
    """Nothing to do after a layer."""

    def __call__(self, layer: nn.Module) -> None:
        pass
