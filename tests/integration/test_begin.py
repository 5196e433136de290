"""Start and update are one call where no worker has to wait for anybody who samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import torch
from torch import nn

import weight_transfer as wt
from support.models import Odd, Small, digest
from weight_transfer.control import HttpChannel, serve
from weight_transfer.testing.actors import eventually

pytestmark = pytest.mark.timeout(60)

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)


class Many(nn.Module):
    """As many weights as make a trainer say that an update is about to start."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(600):
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(3), requires_grad=False))

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(3, generator=generator))


class Fleet:
    """Two workers over HTTP, and the channels to them."""

    def __init__(self, stack: ExitStack, config: wt.WeightTransferConfig) -> None:
        self.trainer = Small(0)
        self.models = [Small(seed) for seed in (1, 2)]
        self.receivers = [stack.enter_context(wt.WeightReceiver(config, model)) for model in self.models]
        self.servers = [stack.enter_context(serve(receiver)) for receiver in self.receivers]
        self.channels = [stack.enter_context(HttpChannel(server.url)) for server in self.servers]
        self.calls: list[str] = []
        for channel in self.channels:
            self._list(channel)
        self.sender = stack.enter_context(wt.WeightSender(config, self.channels))

    def _list(self, channel: HttpChannel) -> None:
        submit = channel.submit

        def listed(method: str, **arguments: Any) -> Any:
            self.calls.append(method)
            return submit(method, **arguments)

        channel.submit = listed  # type: ignore[method-assign]

    def send(self, seed: int, version: int) -> list[str]:
        """Send; see that both have every bit, and return what was called, each method once."""
        self.calls.clear()
        self.trainer.randomise(seed)
        self.sender.send(self.trainer, version=version)
        assert [receiver.version for receiver in self.receivers] == [version] * 2
        assert [digest(model) for model in self.models] == [digest(self.trainer)] * 2
        return list(dict.fromkeys(self.calls))


@pytest.fixture(params=["loopback", "ipc"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, wt.load_config(CONFIG, backend=request.param))


SLOWLY = ["start_weight_update", "update_weights", "finish_weight_update"]
AT_ONCE = ["begin_weight_update", "finish_weight_update"]
Twice = Callable[[Fleet], None]


def warm_up(fleet: Fleet) -> None:
    for version in range(2):
        assert fleet.send(version, version)[-3:] == SLOWLY
    assert fleet.send(3, 2) == AT_ONCE


def test_once_workers_are_known_to_wait_for_nobody_an_update_begins_with_one_call(fleet: Fleet) -> None:
    warm_up(fleet)
    for version, seed in enumerate((1, 2, 1), 3):
        assert fleet.send(seed, version) == AT_ONCE


def replaced(model: nn.Module, number: int) -> None:
    """Put another parameter into the place of one."""
    setattr(model, f"w{number}", nn.Parameter(torch.zeros(3), requires_grad=False))


def moved(model: nn.Module, number: int) -> None:
    getattr(model, f"w{number}").data = torch.zeros(3)


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("change", [replaced, moved])
def test_workers_look_at_many_weights_while_the_trainer_does_and_see_each_change(
    change: Callable[[nn.Module, int], None], declares: bool
) -> None:
    """A, a change of the model, B, A: what was seen in advance counts for the update that follows alone."""
    trainer, model = Many(), Many()

    def needs(manifest: wt.Manifest) -> dict[str, wt.Target]:
        return {name: wt.Target(wt.Region.whole((3,)), getattr(model, name)) for name in ("w0", "w7")}

    with (
        wt.WeightReceiver(CONFIG, model, needs=needs if declares else None) as receiver,
        serve(receiver) as server,
        HttpChannel(server.url) as channel,
        wt.WeightSender(CONFIG, [channel]) as sender,
    ):
        expected: list[object] = []
        expect = channel.expect_weight_update

        def listed(session: str | None = None) -> Any:
            expected.append(session)
            return expect(session)

        channel.expect_weight_update = listed  # type: ignore[method-assign]
        for seed in (1, 2, 1):
            trainer.randomise(seed)
            sender.send(trainer)
            assert digest(model) == digest(trainer)
            change(model, 7)
            change(model, 40)
        assert len(expected) == 2


def test_workers_whose_version_somebody_holds_are_asked_to_start(fleet: Fleet) -> None:
    warm_up(fleet)
    with fleet.receivers[1].serving():
        assert eventually(lambda: not fleet.channels[1].begins, 20)
    assert fleet.send(4, 4) == SLOWLY


def test_a_worker_that_has_joined_another_trainer_refuses_and_keeps_its_version(fleet: Fleet) -> None:
    warm_up(fleet)
    with wt.WeightSender(wt.load_config(CONFIG, backend=fleet.sender.config.backend), [fleet.receivers[1]]) as other:
        other.send(Small(8), version=8)
    with pytest.raises(wt.ReplacedError):
        fleet.send(4, 9)
    assert fleet.calls[0] == "begin_weight_update"
    assert (fleet.receivers[1].version, digest(fleet.models[1])) == (8, digest(Small(8)))


def test_a_worker_that_has_left_refuses_and_all_get_the_version(fleet: Fleet) -> None:
    warm_up(fleet)
    fleet.receivers[1].leave()
    called = fleet.send(4, 4)
    assert called[0] == "begin_weight_update"
    assert called[1:4] == ["abort_weight_update", "status", "init_weight_transfer_engine"]
    assert called[-3:] == ["start_weight_update", "update_weights", "finish_weight_update"] or set(SLOWLY) < set(called)
    fleet.send(5, 5)


def test_a_worker_whose_server_was_started_anew_is_asked_to_start_before_others_are_touched(fleet: Fleet) -> None:
    warm_up(fleet)
    url = httpx.URL(fleet.servers[0].url)
    fleet.servers[0].close()
    assert eventually(lambda: not fleet.channels[0].begins, 20)
    with serve(fleet.receivers[0], port=url.port or 0):
        assert "begin_weight_update" not in fleet.send(4, 4)


def test_a_failure_after_the_start_is_one_of_the_update(fleet: Fleet) -> None:
    warm_up(fleet)
    fleet.calls.clear()
    with pytest.raises(wt.ManifestMismatchError) as caught:
        fleet.sender.send(Odd(4, rows=8, width=8), version=4)
    assert fleet.calls[:2] == ["begin_weight_update"] * 2 or "weight_needs" in fleet.calls
    assert caught.value.peer in [server.url for server in fleet.servers]
    assert [receiver.version for receiver in fleet.receivers] == [2, 2]
    fleet.send(5, 5)


def test_samplers_that_come_between_are_waited_for_and_named_with_the_phase() -> None:
    config = wt.load_config(CONFIG, timeout=2)
    model = Small(1)
    with ExitStack() as stack:
        receiver = stack.enter_context(wt.WeightReceiver(config, model))
        server = stack.enter_context(serve(receiver))
        channel = stack.enter_context(HttpChannel(server.url))
        sender = stack.enter_context(wt.WeightSender(config, [channel]))
        for version in range(2):
            sender.send(Small(2), version=version)
        with receiver.serving():
            pass  # from here on the line says so, and that is overlooked
        assert eventually(lambda: not channel.begins, 20)
        assert channel._line is not None
        channel._line.waits = False
        with receiver.serving(), pytest.raises(wt.TransferTimeoutError, match="still in serving") as caught:
            sender.send(Small(3), version=3)
        assert (caught.value.phase, caught.value.peer) == ("start", server.url)
        assert (receiver.version, digest(model)) == (1, digest(Small(2)))
        sender.send(Small(3), version=3)
        assert (receiver.version, digest(model)) == (3, digest(Small(3)))
