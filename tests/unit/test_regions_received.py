"""A worker's side of updates by region: what it is asked, what its engine is given, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from torch import nn

from support.listeners import Recorder
from support.scripted import INIT, STATES
from weight_transfer import (
    ConfigError,
    LifecycleError,
    LocalChannel,
    Manifest,
    ManifestMismatchError,
    ModuleSource,
    ParallelConfig,
    ReceiverState,
    Region,
    SessionError,
    Target,
    TransferError,
    TransferProgress,
    TransferTimeoutError,
    WeightReceiver,
)
from weight_transfer.control import HttpChannel, serve
from weight_transfer.errors import HandshakeError
from weight_transfer.memory.place import place_of
from weight_transfer.model.info import WeightNeeds, WeightTransferUpdateInfo, WireEncoder
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer.plan.exchange import IncomingRegions

pytestmark = pytest.mark.timeout(60)

RANKS = 2
SPLIT = ("a.weight", "b.weight", "c.weight")


class Trained(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(3, 4)


class Half(nn.Module):
    """The second of two workers: the last rows of a, the last columns of b, all of c and of the biases."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2, 6))
        self.columns = nn.Parameter(torch.zeros(2, 7))
        self.a, self.b, self.c = nn.Module(), nn.Module(), nn.Linear(3, 4)
        self.a.bias, self.b.bias = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(7))

    def needs(self) -> dict[str, Any]:
        return {
            "a.weight": Target(Region((3, 0), (2, 6)), self.rows),
            "b.weight": Target(Region((0, 3), (7, 2)), self.columns.t()),
            "c.weight": [Target(Region((2 * i, 0), (2, 3)), self.c.weight[2 * i : 2 * i + 2]) for i in range(2)],
        }

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Load the biases, which have no targets."""
        for name, tensor in weights:
            with torch.no_grad():
                self.get_parameter(name).copy_(tensor)

    def assert_is_part_of(self, trained: Trained) -> None:
        assert torch.equal(self.rows, trained.a.weight[3:])
        assert torch.equal(self.columns.t(), trained.b.weight[:, 3:])
        assert torch.equal(self.c.weight, trained.c.weight)
        for name in "abc":
            assert torch.equal(getattr(self, name).bias, getattr(trained, name).bias)


class Trainer:
    """Two trainer ranks, each with half the rows of each weight, and worker number 1, which is tested."""

    def __init__(
        self,
        script: Any,
        receiver: WeightReceiver | HttpChannel,
        names: tuple[str, ...] = SPLIT,
        trained: nn.Module | None = None,
    ) -> None:
        self.script, self.receiver = script, receiver
        self.trained = trained or Trained(0)
        self.manifest = ModuleSource(self.trained).manifest()
        self.encoder, self.known = WireEncoder(), dict[str, str]()
        self.is_checkpoint_format = True
        self.incoming: list[IncomingRegions] = []
        self.infos: list[WeightTransferUpdateInfo] = []
        self.regions = [{name: self.held(rank, name) for name in names} for rank in range(RANKS)]
        layout = Layout.of([Regions.of(self.manifest, own) for own in self.regions])
        self.layout = layout.to_wire()
        self.kept: tuple[str, ...] = ()
        script.receive, script.regions = self.receive, self.move
        receiver.init_weight_transfer_engine(INIT | {"rank_offset": 2, "world_size": 3, "session": "s"})

    def held(self, rank: int, name: str) -> list[Region]:
        """Return half of the rows; of a scalar rank 0 has all."""
        shape = self.manifest.by_name[name].shape
        if not shape:
            return [Region.whole(shape)] if rank == 0 else []
        return [Region.split(shape, 0, rank, RANKS)]

    def ask(self, **fields: Any) -> dict[str, Any]:
        request = WeightNeeds(manifest=self.manifest, session="s", **fields)
        wire = json.loads(json.dumps(self.encoder.encode(request, self.known)))
        answer = self.receiver.weight_needs(wire)
        assert answer is not None
        self.known |= self.encoder.digests(request)
        return answer

    def agree(self) -> None:
        """Ask, and take the answer."""
        (own,) = self.ask(is_checkpoint_format=self.is_checkpoint_format)["needs"]
        self.kept = ("", Regions.from_wire(own, self.manifest).digest)

    def receive(self, _engine: Any, info: WeightTransferUpdateInfo, load_weights: Any) -> None:
        self.infos.append(info)
        weights = self.trained.state_dict()
        for param in info.manifest.params:
            load_weights([(param.name, weights[param.name])])

    def move(self, info: WeightTransferUpdateInfo, incoming: IncomingRegions) -> None:
        self.infos.append(info)
        self.incoming.append(incoming)
        weights = self.trained.state_dict()
        tensors = [
            [weights[self.manifest.params[index].name][region.slices] for index, region in incoming.layout.shards(rank)]
            for rank in range(RANKS)
        ]
        pieces = incoming.pieces
        for number in range(len(pieces)):
            self.write(incoming, tensors, number)

    def write(self, incoming: IncomingRegions, tensors: list[list[torch.Tensor]], number: int) -> None:
        pieces = incoming.pieces
        rank, shape = int(pieces.rank[number]), pieces.shape[number].tolist()
        source, target = tensors[rank][pieces.shard[number]], incoming.targets[pieces.target[number]]

        def box(starts: list[int]) -> tuple[slice, ...]:
            return tuple(slice(start, start + size) for start, size in zip(starts[: target.ndim], shape, strict=False))

        incoming.write_in_place()
        target[box(pieces.target_start[number].tolist())] = source[box(pieces.source_start[number].tolist())]
        incoming.moved(rank, int(pieces.sizes[number]))

    def send(self, seed: int, version: int | str, **fields: Any) -> WorkerReport:
        torch.manual_seed(seed)
        for parameter in self.trained.parameters():
            nn.init.normal_(parameter)
        update = WeightTransferUpdateInfo(
            **{
                "manifest": self.manifest,
                "timeout": 10,
                "version": version,
                "layout": self.layout,
                "shares": ({}, {}),
                "kept": self.kept,
                "session": "s",
            }
            | fields
        )
        self.receiver.start_weight_update("s")
        answer = self.receiver.update_weights(json.loads(json.dumps(self.encoder.encode(update, self.known))))
        self.known |= self.encoder.digests(update)
        self.receiver.finish_weight_update(version, "s")
        return WorkerReport.of(answer)


@pytest.fixture
def half() -> Half:
    return Half()


@pytest.fixture
def receiver(script: Any, half: Half) -> Iterator[WeightReceiver]:
    with WeightReceiver({"backend": "scripted", "timeout": 10}, half, needs=half.needs()) as receiver:
        yield receiver


@pytest.fixture
def trainer(script: Any, receiver: WeightReceiver) -> Trainer:
    result = Trainer(script, receiver)
    result.agree()
    return result


def test_each_byte_comes_once_from_the_rank_that_holds_it(trainer: Trainer, half: Half) -> None:
    for version, seed in enumerate((1, 2, 1)):
        report = trainer.send(seed, version)
        half.assert_is_part_of(trainer.trained)
        # ranks have rows 0:3 and 3:5 of a, 0:4 and 4:7 of b, 0:2 and 2:4 of c
        assert report.moved == (4 * (4 * 2 + 2 * 3), 4 * (2 * 6 + 3 * 2 + 2 * 3))
        assert report.kept == sum(report.moved)
    assert [info.manifest is trainer.infos[0].manifest for info in trainer.infos] == [True, False] * 3
    assert {param.name for param in trainer.infos[0].manifest.params} == {"a.bias", "b.bias", "c.bias"}


def test_the_plan_is_the_same_object_while_nothing_changes(trainer: Trainer, half: Half) -> None:
    for version in range(3):
        trainer.send(version, version)
    first, *others = trainer.incoming
    assert all(other.pieces is first.pieces and other.layout is first.layout for other in others)
    whole, by_region, *later = trainer.infos
    for info in later:
        assert info.layout is whole.layout and info.shares is by_region.shares and info.kept is whole.kept


def test_the_manifest_travels_once_for_the_question_and_the_updates(trainer: Trainer) -> None:
    info = WeightNeeds(manifest=trainer.manifest)
    assert "value" not in trainer.encoder.encode(info, trainer.known)["manifest"]
    assert trainer.ask()["needs"][0] == trainer.ask()["needs"][0]
    trainer.send(1, 1)


def test_all_may_come_by_region(script: Any, receiver: WeightReceiver, half: Half) -> None:
    biases = {f"{name}.bias": Target(Region.whole(bias.shape), bias) for name, bias in _biases(half)}
    with WeightReceiver({"backend": "scripted"}, half, needs=half.needs() | biases) as other:
        trainer = Trainer(script, other, (*SPLIT, *biases))
        trainer.agree()
        report = trainer.send(3, "v")
        assert len(trainer.infos) == 1
        half.assert_is_part_of(trainer.trained)
        assert report.kept == 4 * (12 + 14 + 12 + 5 + 7 + 4)


def _biases(half: Half) -> list[tuple[str, torch.Tensor]]:
    return [(name, getattr(half, name).bias) for name in "abc"]


def test_progress_and_listeners_count_what_comes_by_region(script: Any, half: Half) -> None:
    recorder = Recorder()
    with WeightReceiver({"backend": "scripted"}, half, needs=half.needs(), observers=(recorder,)) as receiver:
        trainer = Trainer(script, receiver)
        trainer.agree()
        report = trainer.send(1, 1)
    told = [event for event in recorder.heard if isinstance(event, TransferProgress)]
    assert told[-1].done == told[-1].total == 4 * (5 + 7 + 4) + report.kept
    assert recorder.heard[0].nbytes == trainer.manifest.nbytes


def test_some_weights_may_come_by_region(trainer: Trainer, half: Half) -> None:
    trainer.send(1, 1, update="first")
    partial = Manifest([param for param in trainer.manifest.params if param.name[0] == "a"], partial=True)
    trainer.manifest = partial
    trainer.regions = [{name: own[name] for name in ("a.weight",)} for own in trainer.regions]
    trainer.layout = Layout.of([Regions.of(partial, own) for own in trainer.regions]).to_wire()
    trainer.agree()
    before = half.c.weight.clone()
    report = trainer.send(2, 2, base="first")
    assert torch.equal(half.rows, trainer.trained.get_parameter("a.weight")[3:])
    assert torch.equal(half.c.weight, before)
    assert report.moved == (0, 48)


# What is refused.


def test_what_a_worker_keeps_must_be_what_it_said(trainer: Trainer, half: Half, receiver: WeightReceiver) -> None:
    trainer.send(1, 1)
    trainer.kept = ("", "0" * 32)
    with pytest.raises(ManifestMismatchError, match="What this worker keeps of the weights has changed"):
        trainer.send(2, 2)
    assert (receiver.state, receiver.version) == (ReceiverState.READY, 1)
    trainer.kept = ()
    with pytest.raises(ManifestMismatchError, match="has changed since it was asked"):
        trainer.send(2, 2)
    trainer.agree()
    trainer.send(3, 3)
    half.assert_is_part_of(trainer.trained)


def test_regions_that_have_changed_since_are_noticed(script: Any, half: Half) -> None:
    columns = [Region((0, 3), (7, 2))]

    def needs(manifest: Manifest) -> dict[str, Any]:
        return half.needs() | {"b.weight": Target(columns[-1], half.columns.t())}

    with WeightReceiver({"backend": "scripted"}, half, needs=needs) as receiver:
        trainer = Trainer(script, receiver)
        trainer.agree()
        trainer.send(1, 1)
        columns.append(Region((0, 0), (7, 2)))
        half.columns.data = half.columns.data.clone()
        with pytest.raises(ManifestMismatchError, match="has changed since it was asked"):
            trainer.send(2, 2)
        trainer.agree()
        trainer.send(2, 2)
        assert torch.equal(half.columns.t(), trainer.trained.get_parameter("b.weight")[:, :2])


def test_targets_that_have_moved_keep_the_plan(script: Any, half: Half) -> None:
    with WeightReceiver({"backend": "scripted"}, half, needs=lambda manifest: half.needs()) as receiver:
        trainer = Trainer(script, receiver)
        trainer.agree()
        trainer.send(1, 1)
        half.c.weight.data = torch.zeros(4, 3)
        trainer.send(2, 2)
        half.assert_is_part_of(trainer.trained)
        assert trainer.incoming[0].pieces is trainer.incoming[1].pieces


def test_a_weight_without_target_cannot_come_by_region(script: Any, receiver: WeightReceiver) -> None:
    trainer = Trainer(script, receiver, (*SPLIT, "a.bias"))
    trainer.agree()
    with pytest.raises(ManifestMismatchError, match=r"'a\.bias' is to come by region, but this worker takes it whole"):
        trainer.send(1, 1)


def _forgets(trainer: Trainer, incoming: IncomingRegions, tensors: Any) -> None:
    for number in range(len(incoming.pieces) - 1):
        trainer.write(incoming, tensors, number)


def _counts_twice(trainer: Trainer, incoming: IncomingRegions, tensors: Any) -> None:
    for number in range(len(incoming.pieces)):
        trainer.write(incoming, tensors, number)
    incoming.moved(0, 4)


def _mixes_ranks(trainer: Trainer, incoming: IncomingRegions, tensors: Any) -> None:
    incoming.write_in_place()
    incoming.moved(0, sum(incoming.pieces.sizes.tolist()))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda *_: None, "0 bytes of trainer rank 0 arrived by region where 56 were planned"),
        (_forgets, r"\d+ bytes of trainer rank \d arrived by region where \d+ were planned"),
        (_counts_twice, "60 bytes of trainer rank 0 arrived by region where 56 were planned"),
        (_mixes_ranks, "152 bytes of trainer rank 0 arrived by region where 56 were planned"),
        (lambda trainer, incoming, _: incoming.moved(2, 4), "4 bytes of trainer rank 2, of ranks 0 to 1"),
        (lambda trainer, incoming, _: incoming.moved(-1, 4), "4 bytes of trainer rank -1"),
        (lambda trainer, incoming, _: incoming.moved(0, -4), "-4 bytes of trainer rank 0"),
    ],
)
def test_an_engine_that_miscounts_never_publishes(
    trainer: Trainer, receiver: WeightReceiver, half: Half, fault: Callable[..., None], words: str
) -> None:
    trainer.send(1, "good")
    move = trainer.move

    def faulty(_info: Any, incoming: IncomingRegions) -> None:
        weights = trainer.trained.state_dict()
        tensors = [
            [weights[trainer.manifest.params[i].name][region.slices] for i, region in incoming.layout.shards(rank)]
            for rank in range(RANKS)
        ]
        fault(trainer, incoming, tensors)

    trainer.script.regions = faulty
    with pytest.raises(ManifestMismatchError, match=words):
        trainer.send(2, "torn")
    assert (receiver.state, receiver.version) == (ReceiverState.FAILED, None)
    trainer.script.regions = move
    again = Trainer(trainer.script, receiver)
    again.agree()
    again.send(3, "healed")
    half.assert_is_part_of(again.trained)
    assert receiver.version == "healed"


def test_a_failure_after_the_first_byte_leaves_no_version(trainer: Trainer, receiver: WeightReceiver) -> None:
    def breaks(_info: Any, incoming: IncomingRegions) -> None:
        incoming.write_in_place()
        raise OSError("the cable was pulled")

    trainer.send(1, 1)
    trainer.script.receive = lambda *_: None
    trainer.script.regions = breaks
    with pytest.raises(TransferError, match="the cable was pulled"):
        trainer.send(2, 2)
    assert (receiver.state, receiver.version) == (ReceiverState.FAILED, None)


def test_a_failure_before_the_first_byte_keeps_the_version(script: Any, half: Half) -> None:
    def breaks(_info: Any, incoming: IncomingRegions) -> None:
        raise OSError("the cable was pulled")

    biases = {f"{name}.bias": Target(Region.whole(bias.shape), bias) for name, bias in _biases(half)}
    with WeightReceiver({"backend": "scripted"}, half, needs=half.needs() | biases) as receiver:
        trainer = Trainer(script, receiver, (*SPLIT, *biases))
        trainer.agree()
        trainer.send(1, 1)
        script.regions = breaks
        with pytest.raises(TransferError, match="the cable was pulled"):
            trainer.send(2, 2)
        assert (receiver.state, receiver.version) == (ReceiverState.CREATED, 1)


def test_nothing_is_written_after_the_deadline(trainer: Trainer, receiver: WeightReceiver, clock: Any) -> None:
    def late(_info: Any, incoming: IncomingRegions) -> None:
        clock.advance(11)
        incoming.write_in_place()

    trainer.script.regions = late
    with pytest.raises(TransferTimeoutError):
        trainer.send(1, 1)


def test_the_regions_have_what_is_left_of_the_deadline(trainer: Trainer, clock: Any) -> None:
    receive = trainer.script.receive

    def slow(*arguments: Any) -> None:
        receive(*arguments)
        clock.advance(4)

    trainer.script.receive = slow
    trainer.send(1, 1)
    assert [info.timeout for info in trainer.infos] == [10, 6]


# The question.


def test_the_answer_says_regions_and_place(trainer: Trainer, half: Half) -> None:
    (own,) = trainer.ask()["needs"]
    regions = Regions.from_wire(own, trainer.manifest)
    assert regions.place == place_of("cpu") == place_of(None)
    assert regions.nbytes == 4 * (12 + 14 + 12)
    names = [param.name for param in trainer.manifest.params]
    assert regions.of_param(names.index("b.weight")) == [Region((0, 3), (7, 2))]
    assert regions.of_param(names.index("c.weight")) == [Region((0, 0), (2, 3)), Region((2, 0), (2, 3))]
    assert regions.of_param(names.index("c.bias")) is None


def test_a_loader_of_its_own_has_no_targets(script: Any) -> None:
    with WeightReceiver({"backend": "scripted"}, Trained(0), load_weights=lambda weights: None) as receiver:
        trainer = Trainer(script, receiver)
        assert trainer.ask() == {"needs": [None]}
        (kernel,) = trainer.ask(is_checkpoint_format=False)["needs"]
        assert Regions.from_wire(kernel, trainer.manifest).nbytes == trainer.manifest.nbytes


def test_a_copy_by_name_keeps_each_weight_whole_and_takes_it_by_region(script: Any) -> None:
    served = Trained(5)
    with WeightReceiver({"backend": "scripted"}, served) as receiver:
        trainer = Trainer(script, receiver)
        trainer.agree()
        for version, seed in enumerate((1, 2, 1)):
            report = trainer.send(seed, version)
            assert report.kept == 4 * (30 + 35 + 12)
            for name, tensor in served.state_dict().items():
                assert torch.equal(tensor, trainer.trained.state_dict()[name])


def test_what_is_copied_by_name_beside_the_targets_may_come_by_region(script: Any, half: Half) -> None:
    with WeightReceiver({"backend": "scripted"}, half, needs=half.needs()) as receiver:
        trainer = Trainer(script, receiver, (*SPLIT, "a.bias"))
        trainer.is_checkpoint_format = False
        trainer.agree()
        for version, seed in enumerate((1, 2, 1)):
            report = trainer.send(seed, version, is_checkpoint_format=False)
            half.assert_is_part_of(trainer.trained)
            assert report.kept == 4 * (12 + 14 + 12 + 5)
            assert {param.name for param in trainer.infos[0].manifest.params} == {"b.bias", "c.bias"}
        assert trainer.incoming[0].pieces is trainer.incoming[-1].pieces


def test_what_is_tied_on_the_trainer_alone_is_copied_afterwards(script: Any) -> None:
    trained, served = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trained[1].weight = trained[0].weight
    with WeightReceiver({"backend": "scripted"}, served) as receiver:
        trainer = Trainer(script, receiver, ("0.weight",), trained)
        trainer.agree()
        trainer.send(1, 1)
    assert torch.equal(served[0].weight, trained[0].weight)
    assert torch.equal(served[1].weight, trained[0].weight)
    assert torch.equal(served[1].bias, trained[1].bias)


def test_scalars_and_weights_without_elements_may_come_by_region(script: Any) -> None:
    def made(value: float) -> nn.Module:
        shapes = {"scalar": (), "none": (0, 4), "row": (1, 3), "cube": (3, 2, 2)}
        return nn.ParameterDict({name: torch.full(shape, value) for name, shape in shapes.items()})

    trained, served = made(1.0), made(0.0)
    with WeightReceiver({"backend": "scripted"}, served) as receiver:
        trainer = Trainer(script, receiver, ("scalar", "none", "row", "cube"), trained)
        trainer.agree()
        report = trainer.send(1, 1)
    assert report.moved == (4 * (1 + 3 + 8), 4 * 4)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(served.state_dict()[name], tensor)


def test_a_worker_may_keep_nothing_at_all(script: Any) -> None:
    trained = nn.Sequential(nn.Linear(3, 4))
    with WeightReceiver({"backend": "scripted"}, nn.Module(), needs={"0.weight": [], "0.bias": []}) as receiver:
        trainer = Trainer(script, receiver, ("0.weight", "0.bias"), trained)
        trainer.agree()
        report = trainer.send(1, 1)
        assert (report.kept, report.moved) == (0, (0, 0))
        assert receiver.version == 1


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"target": "draft"}, ManifestMismatchError, "target 'draft'"),
        ({"manifest": {"digest": "0" * 32}}, ManifestMismatchError, "unknown here"),
        ({"manifest": {"digest": "0" * 32, "value": {}}}, ManifestMismatchError, "does not have the digest"),
        ({"manifest": None}, ConfigError, "manifest"),
        ({"manyfest": {}}, ConfigError, "manyfest"),
        ({"session": "other"}, SessionError, "weight_needs of session other"),
    ],
)
def test_a_bad_question_is_a_sentence_and_changes_nothing(
    trainer: Trainer, receiver: WeightReceiver, change: dict[str, Any], kind: type[Exception], words: str
) -> None:
    trainer.send(1, 1)
    request = WireEncoder().encode(WeightNeeds(manifest=trainer.manifest, session="s"), {})
    with pytest.raises(kind, match=words):
        receiver.weight_needs(request | change)
    assert (receiver.state, receiver.version) == (ReceiverState.READY, 1)
    trainer.send(2, 2)


def test_a_manifest_that_does_not_fit_is_refused_by_name(script: Any) -> None:
    served = Trained(0)
    served.d = nn.Linear(2, 2)
    with WeightReceiver({"backend": "scripted"}, served) as receiver:
        trainer = Trainer(script, receiver)
        with pytest.raises(ManifestMismatchError, match=r"'d\.weight' and 1 more are missing"):
            trainer.ask()
        assert receiver.state is ReceiverState.READY


@pytest.mark.parametrize("state", [state for state in STATES if state != "ready"])
def test_a_question_is_answered_in_state_ready_only(script: Any, state: str) -> None:
    from support.scripted import Worker

    worker = Worker(script)
    STATES[state](worker)
    with pytest.raises(LifecycleError, match="weight_needs cannot be called in state"):
        worker.receiver.weight_needs({})
    worker.receiver.close()


def test_several_receivers_answer_in_the_order_of_their_ranks(script: Any) -> None:
    halves = [Half(), Trained(0)]
    receivers = [
        WeightReceiver(
            {"backend": "scripted"},
            halves[rank],
            needs=halves[0].needs() if rank == 0 else None,
            parallel_config=ParallelConfig(rank=rank, world_size=2),
        )
        for rank in (1, 0)
    ]
    channel = LocalChannel(*receivers)
    channel.init_weight_transfer_engine(INIT)
    manifest = ModuleSource(Trained(0)).manifest()
    wire = WireEncoder().encode(WeightNeeds(manifest=manifest), {})
    needs = channel.weight_needs(wire)["needs"]
    assert [Regions.from_wire(own, manifest).nbytes for own in needs] == [4 * 38, manifest.nbytes]
    for receiver in receivers:
        receiver.close()


def test_the_question_travels_over_http_with_a_token(script: Any, receiver: WeightReceiver, half: Half) -> None:
    with serve(receiver, token="right") as server, HttpChannel(server.url, token="right") as channel:
        trainer = Trainer(script, channel)
        trainer.agree()
        for version, seed in enumerate((1, 2, 1)):
            trainer.send(seed, version)
            half.assert_is_part_of(trainer.trained)
        with pytest.raises(ManifestMismatchError, match="unknown here"):
            channel.weight_needs({"manifest": {"digest": "0" * 32}, "session": "s"})
        with pytest.raises(SessionError):
            channel.weight_needs({"manifest": {"digest": "0" * 32}})
        with HttpChannel(server.url, token="wrong") as stranger, pytest.raises(HandshakeError, match="token"):
            stranger.weight_needs({})


def test_a_server_without_the_question_needs_everything_whole(receiver: WeightReceiver) -> None:
    class Older:
        def __init__(self) -> None:
            for name in ("init", "start", "update", "finish", "abort"):
                suffix = {"init": "_weight_transfer_engine", "update": "_weights"}.get(name, "_weight_update")
                setattr(self, name + suffix, getattr(receiver, name + suffix))
            self.status = receiver.status

    with serve(Older()) as server, HttpChannel(server.url) as channel:  # type: ignore[arg-type]
        assert channel.weight_needs({}) is None
        assert channel.status()["state"] == "created"


# What a report says of several workers, and of foreign ones.


def test_bytes_of_several_workers_are_added_up() -> None:
    several = [WorkerReport("shm", (), 5, (2, 3)), WorkerReport(), WorkerReport("shm", (), 4, (4,))]
    several[0] = attrs.evolve(several[0], seconds={"plan": 1.0, "wire": 2.0})
    several[2] = attrs.evolve(several[2], seconds={"wire": 3.0, "load": 0.5})
    joint = WorkerReport.joint(several)
    assert joint == WorkerReport("shm", (), 9, (6, 3), seconds={"plan": 1.0, "wire": 3.0, "load": 0.5})
    assert WorkerReport.of(joint.to_dict()) == joint


@pytest.mark.parametrize("moved", ["12", [1, "2"], [1.5], [-1], [True], {"0": 1}, None])
def test_a_foreign_answer_may_hold_anything(moved: object) -> None:
    seconds = {"wire": moved, "load": -1.0, "plan": float("nan"), "other": 1.0}
    assert WorkerReport.of({"moved": moved, "kept": "many", "seconds": seconds}) == WorkerReport()
    assert WorkerReport.of({"seconds": moved}) == WorkerReport()
