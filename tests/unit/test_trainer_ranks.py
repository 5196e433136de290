"""The trainer's ranks, as threads of one process: they meet, agree, and learn one outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn

import weight_transfer as wt
from weight_transfer.session import meeting, sender
from weight_transfer.session.following import Follower
from weight_transfer.session.moving import Moving
from weight_transfer.testing.actors import eventually

dist: Any = torch.distributed  # what it holds depends on the build
CONFIG: dict[str, Any] = {"backend": "loopback", "timeout": 20, "init_timeout": 20}


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give all ranks of this process one store, and their senders one name."""
    shared = dist.HashStore()
    monkeypatch.setattr(meeting, "_torch_store", lambda: shared)
    monkeypatch.setattr(sender, "next_key", lambda: "a sender")
    return shared


def model(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(width, 3)


class Ranks:
    """Senders of one trainer, each with a thread of its own for every send."""

    def __init__(self, config: dict[str, Any], receiver: wt.WeightReceiver | str, count: int) -> None:
        self.senders = [
            wt.WeightSender(config, [receiver], parallel_config=wt.ParallelConfig(rank=rank, world_size=count))
            for rank in range(count)
        ]

    def each(self, send: Callable[[int, wt.WeightSender], Any]) -> list[Any]:
        """Return what each rank's ``send`` returns or raises."""
        outcomes: list[Any] = [None] * len(self.senders)

        def run(rank: int) -> None:
            try:
                outcomes[rank] = send(rank, self.senders[rank])
            except BaseException as error:  # noqa: BLE001  (the outcome)
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.senders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return outcomes


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver(CONFIG, model(9)) as made:
        yield made


@pytest.fixture
def new_ranks(receiver: wt.WeightReceiver) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(count: int = 3, **config: Any) -> Ranks:
        made.append(Ranks(CONFIG | config, receiver, count))
        return made[-1]

    yield make
    for ranks in made:
        for each in ranks.senders:
            each.close()


def send(weights: nn.Module, _rank: int, sender: wt.WeightSender) -> Any:
    return sender.send(weights)


def test_every_rank_returns_the_same_report(new_ranks: Callable[..., Ranks], receiver: wt.WeightReceiver) -> None:
    ranks = new_ranks()
    for version in range(3):
        weights = model(version)
        reports = ranks.each(partial(send, weights))
        assert [report.version for report in reports] == [version] * 3
        assert {report.workers for report in reports} == {("worker 0",)}
        assert reports[1].seconds == reports[0].seconds
        assert receiver.version == version


def test_every_rank_raises_what_a_worker_refused(new_ranks: Callable[..., Ranks]) -> None:
    ranks = new_ranks()
    errors = ranks.each(lambda _rank, each: each.send(model(width=5)))
    assert {type(error) for error in errors} == {wt.ManifestMismatchError}
    assert len({str(error) for error in errors}) == 1
    assert [report.version for report in ranks.each(lambda _rank, each: each.send(model()))] == [0] * 3


def test_a_rank_that_fails_by_itself_is_named_on_all(new_ranks: Callable[..., Ranks]) -> None:
    ranks = new_ranks()
    lazy = nn.LazyLinear(3)
    errors = ranks.each(lambda rank, each: each.send(lazy if rank == 2 else model()))
    assert all("has no shape yet" in str(error) for error in errors)
    assert all("trainer rank 2" in str(error) for error in errors[:2])
    assert ranks.each(lambda _rank, each: each.send(model()))[1].version == 0


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda each: each.send(model(width=5), version=1), "trainer rank 1 called send with another model"),
        (lambda each: each.send(model(), version=2), "trainer rank 1 called send with version = 2, rank 0 with 1"),
        (lambda each: each.send(model(), version=1, only=["bias"]), "trainer rank 1 called send with only"),
    ],
)
def test_a_rank_that_is_called_otherwise_is_named_on_all(
    new_ranks: Callable[..., Ranks], receiver: wt.WeightReceiver, odd: Callable[[wt.WeightSender], Any], words: str
) -> None:
    ranks = new_ranks(2)
    ranks.each(lambda _rank, each: each.send(model(), version=0))
    errors = ranks.each(lambda rank, each: odd(each) if rank else each.send(model(), version=1))
    assert all(words in str(error) for error in errors)
    assert receiver.version == 0


def test_a_rank_that_does_not_send_is_named_within_the_deadline(new_ranks: Callable[..., Ranks]) -> None:
    ranks = new_ranks(3, timeout=1)
    errors = ranks.each(lambda rank, each: None if rank == 1 else each.send(model()))
    assert isinstance(errors[0], wt.TransferTimeoutError)
    assert errors[0].peer == "trainer rank 1"
    assert str(errors[2]) == str(errors[0])


def test_a_rank_without_its_first_rank_gives_up(new_ranks: Callable[..., Ranks], monkeypatch: Any) -> None:
    monkeypatch.setattr("weight_transfer.session.following._LATER", 0.1)
    ranks = new_ranks(2, timeout=0.2)
    errors = ranks.each(lambda rank, each: each.send(model()) if rank else None)
    assert isinstance(errors[1], wt.TransferTimeoutError)
    assert errors[1].peer == "trainer rank 0"


def test_another_number_of_ranks_is_refused(new_ranks: Callable[..., Ranks]) -> None:
    first, second = new_ranks(2), new_ranks(3)
    first.senders[1].close()
    first.senders[1] = second.senders[1]
    errors = first.each(lambda _rank, each: each.send(model()))
    assert all("trainer rank 1 counts 3 trainer ranks, rank 0 counts 2" in str(error) for error in errors)


def test_a_rank_that_left_may_come_again(new_ranks: Callable[..., Ranks], receiver: wt.WeightReceiver) -> None:
    ranks = new_ranks(2)
    ranks.each(lambda _rank, each: each.send(model()))
    ranks.senders[1].close()
    ranks.senders[1] = new_ranks(2).senders[1]
    reports = ranks.each(lambda _rank, each: each.send(model(1), version=7))
    if isinstance(reports[0], wt.PeerLostError):  # the first rank has heard only now that the other had left
        reports = ranks.each(lambda _rank, each: each.send(model(1), version=7))
    assert [report.version for report in reports] == [7, 7]
    assert receiver.version == 7


class Gathered(wt.WeightSource):
    """Counts what it yields: as if each tensor were gathered."""

    collective = True

    def __init__(self, module: nn.Module) -> None:
        self._inner = wt.ModuleSource(module)
        self.yielded = 0

    def manifest(self) -> wt.Manifest:
        return self._inner.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in self._inner:
            self.yielded += 1
            yield item


@pytest.mark.parametrize("verify", ["none", "wire"])
def test_all_ranks_run_the_same_collectives_once(new_ranks: Callable[..., Ranks], verify: str) -> None:
    sources = [Gathered(model()) for _ in range(3)]
    new_ranks(verify=verify).each(lambda rank, each: each.send(sources[rank]))
    assert [source.yielded for source in sources] == [2] * 3


def test_a_rank_that_gathers_in_another_order_is_named_on_all(
    new_ranks: Callable[..., Ranks], receiver: wt.WeightReceiver
) -> None:
    """What rank 0 has gathered meanwhile may be made of two weights."""

    class Reversed(Gathered):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(list(super().__iter__())[::-1])

    sources = [Gathered(model()), Reversed(model())]
    errors = new_ranks(2).each(lambda rank, each: each.send(sources[rank]))
    assert all("yielded bias: float32 [3] where its manifest has weight" in str(error) for error in errors), errors
    assert all("trainer rank 1" in str(error) for error in errors)
    assert receiver.version is None
    assert [source.yielded for source in sources] == [2, 2]


def test_a_failed_update_leaves_no_rank_in_a_collective(receiver: wt.WeightReceiver) -> None:
    def fail(_weights: object) -> None:
        raise OSError("full")

    with wt.WeightReceiver(CONFIG, model(), load_weights=fail) as failing:
        ranks = Ranks(CONFIG, failing, 2)
        sources = [Gathered(model()) for _ in range(2)]
        errors = ranks.each(lambda rank, each: each.send(sources[rank]))
        assert all("OSError: full" in str(error) for error in errors)
        assert [source.yielded for source in sources] == [2, 2]
        for each in ranks.senders:
            each.close()


def test_a_rank_that_hears_of_the_abort_first_runs_the_collectives_that_were_ordered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 is in them already, and would wait for ever. What that rank then says is not taken for the cause."""

    def fail(_weights: object) -> None:
        raise OSError("full")

    answer = Follower._answer

    def late(self: Follower, order: Any, *rest: Any) -> None:
        if order["do"] == "send":
            assert eventually(lambda: self._stopped, 20)
        answer(self, order, *rest)

    cause = Moving._cause

    def later(self: Moving, *what: Any) -> Exception:
        assert eventually(lambda: self._fleet.failed is not None, 20)
        return cause(self, *what)

    monkeypatch.setattr(Follower, "_answer", late)
    monkeypatch.setattr(Moving, "_cause", later)
    config = CONFIG | {"backend": "ipc"}
    with wt.WeightReceiver(config, model(), load_weights=fail) as failing:
        ranks = Ranks(config, failing, 2)
        sources = [Gathered(model()) for _ in range(2)]
        errors = ranks.each(lambda rank, each: each.send(sources[rank]))
        assert all("OSError: full" in str(error) for error in errors), errors
        assert [source.yielded for source in sources] == [2, 2]
        for each in ranks.senders:
            each.close()


def test_a_rank_that_dies_in_a_collective_is_named(new_ranks: Callable[..., Ranks]) -> None:
    """What breaks on rank 0 then is the collective, which says nothing of ranks."""
    ranks = new_ranks(2)

    class Broken(Gathered):
        def __init__(self, rank: int) -> None:
            super().__init__(model())
            self._rank = rank

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            if self._rank:
                ranks.senders[1]._cancel()
            raise RuntimeError("Connection reset by peer")

    errors = ranks.each(lambda rank, each: each.send(Broken(rank)))
    assert isinstance(errors[0], wt.PeerLostError)
    assert errors[0].peer == "trainer rank 1"


def test_a_worker_may_come_while_ranks_give_what_they_gave_before() -> None:
    """What a rank says of its shards is told anew for a new plan, though it has not changed."""
    config = CONFIG | {"backend": "ipc"}
    weights = torch.randn(4, 6)

    def halves(rank: int) -> wt.ShardedSource:
        return wt.ShardedSource([("weight", (4, 6), (2 * rank, 0), weights[2 * rank : 2 * rank + 2].clone())])

    models = [nn.Linear(6, 4, bias=False) for _ in range(2)]
    with wt.WeightReceiver(config, models[0]) as first, wt.WeightReceiver(config, models[1]) as second:
        ranks = Ranks(config, first, 2)
        sources = [halves(rank) for rank in range(2)]
        for version in range(4):
            if version == 2:
                ranks.senders[0].add_worker(second)
            reports = ranks.each(lambda rank, each: each.send(sources[rank]))
            assert [report.version for report in reports] == [version] * 2, reports
        assert all(torch.equal(model.weight, weights) for model in models)
        assert second.version == 3
        for each in ranks.senders:
            each.close()


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_finds_other_weights_while_bytes_move_has_all_send_anew(
    who: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A, another parameter in the place of one of one rank, B, and again."""
    monkeypatch.setattr("weight_transfer.session.outgoing.MANY", 0)
    monkeypatch.setattr("weight_transfer.model.looking._CARE", 1)
    caplog.set_level("INFO", "weight_transfer.session.sender")
    config = CONFIG | {"backend": "ipc"}
    served, sent = nn.Linear(8, 3), [nn.Linear(8, 3) for _ in range(2)]
    with wt.WeightReceiver(config, served) as receiver:
        ranks = Ranks(config, receiver, 2)
        for version in range(18):
            if version % 6 == 5:
                sent[who].weight = nn.Parameter(torch.zeros(3, 8))
            for weights in sent:
                weights.load_state_dict(model(version).state_dict())
            reports = ranks.each(lambda rank, each: each.send(sent[rank]))
            assert reports[0].params == reports[1].params == 2, reports
            assert receiver.version == version
            assert torch.equal(served.weight, model(version).weight)
        for each in ranks.senders:
            each.close()
    assert caplog.text.count("beginning anew: weights were replaced") == 2 * 3


@pytest.mark.parametrize("backend", ["loopback", "ipc"])
def test_a_worker_that_refuses_to_begin_has_all_ranks_send_anew(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "weight_transfer.session.sender")
    served, sent, config = nn.Linear(8, 3), nn.Linear(8, 3), CONFIG | {"backend": backend}
    with wt.WeightReceiver(config, served) as receiver, wt.serve(receiver) as server:
        ranks = Ranks(config, server.url, 2)
        for version in range(6):
            if version == 4:
                receiver.leave()
            sent.load_state_dict(model(version).state_dict())
            reports = ranks.each(partial(send, sent))
            assert reports[0].params == reports[1].params == 2, reports
            assert torch.equal(served.weight, model(version).weight)
        for each in ranks.senders:
            each.close()
    assert caplog.text.count("beginning anew") == 2


def test_each_new_trainer_asks_what_a_worker_keeps_that_keeps_a_part() -> None:
    config = CONFIG | {"backend": "ipc"}
    served = nn.Linear(6, 2, bias=False)
    needs = {"weight": wt.Target(wt.Region((1, 0), (2, 6)), served.weight.detach())}
    with wt.WeightReceiver(config, served, needs=needs) as receiver:
        for version in range(4):
            model = nn.Linear(6, 4, bias=False)
            with wt.WeightSender(config, [receiver]) as sender:
                for each in (2 * version, 2 * version + 1):
                    assert sender.send(model, version=each).version == each
                    assert torch.equal(served.weight, model.weight[1:3])
