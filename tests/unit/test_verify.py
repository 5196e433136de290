"""What was sent is compared with what arrived, and with what lies in the model, before anybody publishes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer import IntegrityError, ParallelConfig, Region, Target
from weight_transfer.control import joint_init
from weight_transfer.copying import host
from weight_transfer.model.loading import KernelFormatLoader
from weight_transfer.session.incoming import Incoming
from weight_transfer.session.landed import Landed
from weight_transfer.session.update import Update

LOOPBACK = {"backend": "loopback", "timeout": 20}
IPC = {"backend": "ipc", "timeout": 20}
BACKENDS = pytest.mark.parametrize("config", [LOOPBACK, IPC], ids=["loopback", "ipc"])


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(seed))
        self.randomise(seed)

    def randomise(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class Half(nn.Module):
    """One of two workers: its rows of a, its columns of b."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rows, self.columns = nn.Parameter(torch.zeros(2, 6)), nn.Parameter(torch.zeros(4, 2))

    def needs(self) -> dict[str, Target]:
        return {
            "a.weight": Target(Region.split((4, 6), 0, self.rank, 2), self.rows),
            "b.weight": Target(Region.split((4, 4), 1, self.rank, 2), self.columns),
        }


class Scene:
    """Receivers and a sender, each of which is closed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def receiver(self, config: dict[str, Any], model: nn.Module, **arguments: Any) -> wt.WeightReceiver:
        return self._stack.enter_context(wt.WeightReceiver(config, model, **arguments))

    def sender(self, config: dict[str, Any], workers: list[Any]) -> wt.WeightSender:
        return self._stack.enter_context(wt.WeightSender(config, workers))

    def halves(self, config: dict[str, Any]) -> tuple[list[Half], wt.LocalChannel]:
        halves = [Half(0), Half(1)]
        receivers = [
            self.receiver(
                config, half, needs=half.needs(), parallel_config=ParallelConfig(rank=half.rank, world_size=2)
            )
            for half in halves
        ]
        return halves, wt.LocalChannel(*receivers)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack)


class Halved(nn.Module):
    """What two halves are of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(4, 4, bias=False)


# Receipts.


@BACKENDS
@pytest.mark.parametrize("verify", ["wire", "loaded"])
def test_workers_that_received_the_same_have_the_same_receipt(
    scene: Scene, config: dict[str, Any], verify: str
) -> None:
    config = config | {"verify": verify}
    workers = [scene.receiver(config, Net(seed)) for seed in (7, 8)]
    sender, digests = scene.sender(config, workers), []
    for seed in (1, 2, 1):
        net = Net(seed)
        (first,), (second,) = sender.send(net).receipts.values()
        assert (first.worker, second.worker) == (0, 1)
        assert (first.names, first.nbytes) == (5, sum(tensor.nbytes for tensor in net.state_dict().values()))
        assert first.digest == second.digest
        assert [worker.status()["digests"] for worker in workers] == [{"model": first.digest}] * 2
        digests.append(first.digest)
    assert digests[0] == digests[2] != digests[1]


def test_without_verify_a_receipt_counts_alone(scene: Scene) -> None:
    receiver = scene.receiver(LOOPBACK, Net())
    scene.sender(LOOPBACK, [receiver]).send(Net())
    assert receiver.status()["digests"], "the default is to compare"
    report = scene.sender(LOOPBACK | {"verify": "none"}, [receiver]).send(Net())
    (receipt,) = report.receipts["worker 0"]
    assert (receipt.names, receipt.nbytes, receipt.digest) == (5, report.nbytes, "")
    assert receiver.status()["digests"] == {}


def test_the_receipt_of_what_goes_by_region_is_of_what_the_worker_keeps(scene: Scene) -> None:
    config = IPC | {"verify": "wire"}
    halves, channel = scene.halves(config)
    sender, trained, digests = scene.sender(config, [channel]), Halved(), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        nn.init.normal_(trained.a.weight)
        report = sender.send(trained)
        assert not report.gathered
        assert torch.equal(torch.cat([half.rows for half in halves]), trained.a.weight)
        receipts = report.receipts["worker 0"]
        assert [receipt.nbytes for receipt in receipts] == [4 * (12 + 8)] * 2
        assert [receipt.names for receipt in receipts] == [2, 2]
        digests.append([receipt.digest for receipt in receipts])
    assert digests[0] == digests[2]
    assert len({*digests[0], *digests[1]}) == 4


# Wrong bytes on the way.


def flip(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(torch.uint8)[(0,) * tensor.dim()] ^= 1


def damaging(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have one bit of a weight that comes whole flipped on the way, on whichever worker it comes to first."""
    honest, left = Update.__call__, [name]

    def load(update: Update, weights: list[tuple[str, torch.Tensor]]) -> None:
        if name in left and name in dict(weights):
            left.clear()
            weights = [(own, tensor.clone()) for own, tensor in weights]
            flip(dict(weights)[name])
        honest(update, weights)

    monkeypatch.setattr(Update, "__call__", load)


def test_a_wrong_bit_is_named_and_published_by_nobody(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LOOPBACK | {"verify": "wire"}
    workers = [scene.receiver(config, Net(seed)) for seed in (7, 8)]
    sender = scene.sender(config, workers)
    sender.send(Net(1))
    damaging(monkeypatch, "b.weight")
    with pytest.raises(IntegrityError, match=r"Parameter 'b.weight' arrived with other bytes than were sent") as caught:
        sender.send(Net(2))
    assert caught.value.param == "b.weight"
    assert caught.value.peer in {"worker 0", "worker 1"}
    assert caught.value.expected != caught.value.got
    assert [worker.version for worker in workers] == [None, None]
    assert sender.send(Net(2)).version == 1
    assert [worker.version for worker in workers] == [1, 1]


def test_a_worker_with_wrong_bits_is_left_behind_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LOOPBACK | {"verify": "wire", "on_worker_failure": "continue"}
    workers = [scene.receiver(config, Net(seed)) for seed in (7, 8)]
    sender = scene.sender(config, workers)
    sender.send(Net(1))
    damaging(monkeypatch, "a.bias")
    report = sender.send(Net(2))
    ((address, error),) = report.lost
    assert "a.bias" in error
    assert address not in report.receipts
    assert sorted(str(worker.state) for worker in workers) == ["failed", "ready"]
    assert sender.send(Net(3)).lost == ()
    assert [worker.version for worker in workers] == [2, 2]


def test_a_copy_out_of_shared_memory_that_is_left_out_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config, net = IPC | {"verify": "wire"}, Net()
    receiver = scene.receiver(config, net)
    sender = scene.sender(config, [receiver])
    sender.send(Net(1))
    honest, left = host._Small.run, net.b.weight.detach()

    def run(copies: host._Small) -> None:
        before = left.clone()
        honest(copies)
        left.copy_(before)

    with monkeypatch.context() as wire:
        wire.setattr(host._Small, "run", run)
        with pytest.raises(IntegrityError, match=r"Parameter 'b.weight' arrived with other bytes"):
            sender.send(Net(2))
    assert receiver.version is None
    assert sender.send(Net(2)).version == 1
    assert all(map(torch.equal, net.parameters(), Net(2).parameters()))


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_a_wrong_bit_of_what_comes_by_region_is_named(scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = IPC | {"verify": "wire"}
    _, channel = scene.halves(config)
    sender = scene.sender(config, [channel])
    sender.send(Halved())
    honest = Incoming.finish

    def finish(incoming: Incoming) -> None:
        flip(incoming.targets[["a.weight", "b.weight"].index(name)])
        honest(incoming)

    with monkeypatch.context() as wire:
        wire.setattr(Incoming, "finish", finish)
        with pytest.raises(IntegrityError, match=f"Parameter '{name}' arrived with other bytes"):
            sender.send(Halved())
    assert channel.status()["version"] is None
    assert sender.send(Halved()).version == 1


def test_several_wrong_weights_are_among_those_that_are_named(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LOOPBACK | {"verify": "wire"}
    sender = scene.sender(config, [scene.receiver(config, Net())])
    damaging(monkeypatch, "a.weight")
    damaging(monkeypatch, "b.bias")
    with pytest.raises(IntegrityError, match=r"Some of '[ab.weightis', ]+ arrived") as caught:
        sender.send(Net(1))
    assert "'a.weight'" in str(caught.value)


class Deaf(wt.LocalChannel):
    """A channel whose server answers one of the calls itself."""

    def __init__(self, receiver: wt.WeightReceiver, call: str, answer: object = None) -> None:
        super().__init__(receiver)
        self._call, self._answer = call, answer

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Any:
        answer = super().init_weight_transfer_engine(init_info)
        return self._answer if self._call == "init" else answer

    def update_weights(self, update_info: dict[str, Any]) -> Any:
        answer = super().update_weights(update_info)
        return self._answer if self._call == "update" else answer


SAYS_NOTHING = "drops what workers answer, or it has another version of weight-transfer. Hand the answers on, or set"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, SAYS_NOTHING),
        ("done", SAYS_NOTHING),
        ({"dtypes": {}}, SAYS_NOTHING),
        ({"digests": "crc32"}, "by 'crc32' and the trainer by 'xxh3-64/131072', so bytes cannot be compared. Install"),
        ({"digests": ["xxh3"]}, "Install the same version of weight-transfer on both sides, or set"),
    ],
)
def test_a_worker_that_cannot_say_what_arrives_is_refused_when_it_joins(
    scene: Scene, answer: object, words: str
) -> None:
    receiver = scene.receiver(LOOPBACK, Net(), version=3)
    channel = Deaf(receiver, "init", answer)
    with pytest.raises(wt.HandshakeError, match=re.escape(words)) as caught:
        scene.sender(LOOPBACK, [channel]).send(Net(1))
    assert str(caught.value).count("set verify = 'none' on the trainer") == 1
    assert (caught.value.peer, caught.value.phase) == ("worker 0", "init")
    assert receiver.version == 3, "it serves what it has"
    assert scene.sender(LOOPBACK | {"verify": "none"}, [channel]).send(Net(1)).version == 4
    assert receiver.version == 4


@pytest.mark.parametrize(
    ("answers", "joint"),
    [
        ([{"digests": "a"}, {"digests": "a"}], {"digests": "a"}),
        ([{"digests": "a"}, {"digests": "b"}], None),
        ([{"digests": "a"}, None], None),
        ([{"digests": ["a"]}, {"digests": ["a"]}], {"digests": ["a"]}),
        ([{"digests": "a", "dtypes": {"x": ["w"]}}] * 2, {"digests": "a", "dtypes": {"x": ["w"]}}),
        ([{"digests": "a", "dtypes": {"x": ["w"]}}, {"digests": "a"}], {"digests": "a"}),
        ([{"dtypes": {"x": ["w"]}}, {"digests": "a", "dtypes": {"x": ["w"]}}], {"dtypes": {"x": ["w"]}}),
        (["done", "done"], None),
    ],
)
def test_a_replica_says_what_all_of_its_workers_say(answers: list[Any], joint: object) -> None:
    assert joint_init(answers) == joint


def test_of_a_replica_all_workers_have_to_say_what_arrives(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    _, channel = scene.halves(LOOPBACK)
    sender = scene.sender(LOOPBACK, [channel])
    receiver = channel._receivers[1]
    joins = receiver.init_weight_transfer_engine
    monkeypatch.setattr(receiver, "init_weight_transfer_engine", lambda info: joins(info) and None)
    with pytest.raises(wt.HandshakeError, match=SAYS_NOTHING):
        sender.connect()
    monkeypatch.undo()
    assert sender.send(Halved()).receipts


@pytest.mark.parametrize("call", ["init", "update"])
def test_with_continue_a_worker_that_cannot_say_what_arrived_is_left_behind(scene: Scene, call: str) -> None:
    config = IPC | {"on_worker_failure": "continue"}
    one, other = (scene.receiver(config, Net(seed)) for seed in (7, 8))
    sender = scene.sender(config, [one, Deaf(other, call)])
    for version in (1, 2):
        report = sender.send(Net(version), version=version)
        ((address, error),) = report.lost
        assert address == "worker 1" and "set verify = 'none' on the trainer" in error
        assert (one.version, other.version) == (version, None)
        assert other.state in (wt.ReceiverState.CREATED, wt.ReceiverState.FAILED), "it has left the trainer"


def test_where_all_have_to_join_anew_a_worker_that_cannot_say_what_arrives_fails_all(scene: Scene) -> None:
    config = LOOPBACK | {"on_worker_failure": "continue"}
    one, other = (scene.receiver(config, Net(seed), version=3) for seed in (7, 8))
    with pytest.raises(wt.HandshakeError, match=SAYS_NOTHING) as caught:
        scene.sender(config, [one, Deaf(other, "init")]).send(Net(1))
    assert caught.value.peer == "worker 1"
    assert (one.version, other.version) == (3, 3)


def test_a_worker_that_does_not_say_what_has_arrived_publishes_nothing(scene: Scene) -> None:
    receiver = scene.receiver(LOOPBACK, Net())
    channel = Deaf(receiver, "update", {"transport": "mine"})
    with pytest.raises(wt.TransferError, match="answer to update_weights does not say what has arrived") as caught:
        scene.sender(LOOPBACK, [channel]).send(Net(1))
    assert "have its server hand that answer on, or set verify = 'none' on the trainer" in str(caught.value)
    assert (caught.value.peer, caught.value.phase) == ("worker 0", "update")
    assert receiver.version is None
    assert scene.sender(LOOPBACK | {"verify": "none"}, [channel]).send(Net(1)).receipts == {}


# Wrong bytes in the model.


class Tied(nn.Module):
    """One weight on the trainer, and two of the worker."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        if tied:
            self.two.weight = self.one.weight


def spoil(tensor: torch.Tensor) -> None:
    nn.init.constant_(tensor, 7)


def spoiling(monkeypatch: pytest.MonkeyPatch, after: Callable[[KernelFormatLoader], None]) -> None:
    honest = KernelFormatLoader.finish

    def finish(loader: KernelFormatLoader) -> None:
        honest(loader)
        after(loader)

    monkeypatch.setattr(KernelFormatLoader, "finish", finish)


@BACKENDS
def test_a_loader_that_writes_other_bytes_is_found(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    model = Net()
    receiver = scene.receiver(config, model)
    spoiling(monkeypatch, lambda _loader: spoil(model.b.weight))
    scene.sender(config | {"verify": "wire"}, [receiver]).send(Net(1))
    assert receiver.version == 0, "the digests of what arrived do not say what lies in the model"
    with pytest.raises(IntegrityError, match=r"'b.weight' lies in the worker's model with other bytes than arrived"):
        scene.sender(config | {"verify": "loaded"}, [receiver]).send(Net(2))
    assert receiver.version is None


def test_what_is_tied_on_the_trainer_alone_is_read_back_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied(tied=False)
    sender = scene.sender(LOOPBACK | {"verify": "loaded"}, [scene.receiver(LOOPBACK, model)])
    sender.send(Tied(tied=True))
    spoiling(monkeypatch, lambda _loader: spoil(model.two.weight))
    with pytest.raises(IntegrityError, match=r"'one.weight' lies in"):
        sender.send(Tied(tied=True))


def test_what_was_put_in_place_by_region_is_read_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = IPC | {"verify": "loaded"}
    halves, channel = scene.halves(config)
    sender = scene.sender(config, [channel])
    sender.send(Halved())
    spoiling(monkeypatch, lambda loader: spoil(halves[1].columns) if loader._weights._module is halves[1] else None)
    with pytest.raises(IntegrityError, match=r"'b.weight' lies in"):
        sender.send(Halved())


def test_who_writes_between_two_looks_at_a_region_is_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the digests that the trainer compares, and those of what is to lie in the model."""
    config = IPC | {"verify": "loaded"}
    halves, channel = scene.halves(config)
    sender = scene.sender(config, [channel])
    sender.send(Halved())
    honest = Landed.take_regions

    def take(landed: Landed) -> None:
        honest(landed)
        spoil(halves[1].columns)

    monkeypatch.setattr(Landed, "take_regions", take)
    with pytest.raises(IntegrityError, match=r"'b.weight'"):
        sender.send(Halved())
    assert channel.status()["version"] is None


def test_parts_of_what_comes_whole_are_read_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LOOPBACK | {"verify": "loaded"}
    halves, channel = scene.halves(config)
    sender = scene.sender(config, [channel])
    sender.send(Halved())
    spoiling(monkeypatch, lambda _loader: spoil(halves[0].rows))
    with pytest.raises(IntegrityError, match=r"'a.weight' lies in"):
        sender.send(Halved())


def test_a_loader_that_cannot_be_read_back_is_refused_before_the_first_byte(scene: Scene) -> None:
    taken: list[str] = []
    receiver = scene.receiver(LOOPBACK, Net(), load_weights=lambda weights: taken.extend(dict(weights)))
    with pytest.raises(wt.ConfigError, match=r"does not keep 'a.weight' as it is sent, or does not say where"):
        scene.sender(LOOPBACK | {"verify": "loaded"}, [receiver]).send(Net(1))
    assert not taken
    scene.sender(LOOPBACK | {"verify": "wire"}, [receiver]).send(Net(1))
    assert len(taken) == 5
