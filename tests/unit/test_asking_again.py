"""A worker whose loader learns from an update what it keeps: the trainer asks again, and sends no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from support.region_case import same_bits
from weight_transfer import (
    LocalChannel,
    ManifestMismatchError,
    ParallelConfig,
    Region,
    Target,
    TransferReport,
    WeightReceiver,
    WeightSender,
    serve,
)
from weight_transfer.model.loading import KernelFormatLoader
from weight_transfer.testing.models import randomise
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer import Manifest

pytestmark = pytest.mark.timeout(60)

IPC: dict[str, Any] = {"backend": "ipc", "timeout": 20, "init_timeout": 20}
NAMES = ("a.weight", "b.weight")
WHOLE_BYTES = 2 * 8 * 6 * 4


def trained(seed: int) -> nn.ModuleDict:
    result = nn.ModuleDict({name: nn.Linear(6, 8, bias=False) for name in "ab"})
    randomise(result, seed)
    return result


class Learner:
    """Keeps some rows of each weight. It takes weights whole until it is told what else to say, after an update.

    Attributes:
        rows: what it keeps.
        then: what its targets are after the next update: some rows; none, so that all comes whole; or an error.
        loaded: the names that came whole.
    """

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.then: slice | ManifestMismatchError | None = None
        self.said: Any = {}
        self.loaded: list[str] = []
        self.mappings = 0
        self.kept = {name: torch.zeros(8, 6) for name in NAMES}

    def begin(self, manifest: Manifest) -> None:
        assert sorted(manifest.by_name) == sorted(NAMES)
        if isinstance(self.said, ManifestMismatchError):
            raise self.said

    def __call__(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.loaded.append(name)
            self.kept[name][self.rows] = tensor[self.rows]

    def finish(self) -> None:
        if self.then is None:
            self.said = {}
        elif isinstance(self.then, ManifestMismatchError):
            self.said = self.then
        elif not self.said or self.then != self.rows:
            self.rows = self.then
            self.said = self.made()

    def made(self) -> Any:
        """Return a new mapping of the rows that are kept."""
        region = Region((self.rows.start, 0), (self.rows.stop - self.rows.start, 6))
        self.mappings += 1
        return {name: (Target(region, tensor[self.rows]),) for name, tensor in self.kept.items()}

    def targets(self, _manifest: Manifest) -> Any:
        if isinstance(self.said, ManifestMismatchError):
            raise self.said
        return self.said

    def assert_holds(self, model: nn.Module, rows: slice) -> None:
        for name, weight in model.state_dict().items():
            assert same_bits(self.kept[name][rows], weight[rows])


class Counting(LocalChannel):
    """Counts the questions."""

    def __init__(self, *receivers: WeightReceiver) -> None:
        super().__init__(*receivers)
        self.questions = 0
        self.answers: list[dict[str, Any]] = []

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any]:
        self.questions += 1
        return super().weight_needs(request)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.answers.append(super().update_weights(update_info))
        return self.answers[-1]


class Session:
    """Workers with learners behind one channel, and their trainer."""

    def __init__(self, stack: ExitStack, *rows: slice, over_http: bool = False) -> None:
        self.learners = [Learner(own) for own in rows]
        self.receivers = []
        for rank, learner in enumerate(self.learners):
            parallel = ParallelConfig(rank=rank, world_size=len(rows))
            receiver = WeightReceiver(IPC, nn.Identity(), parallel_config=parallel, load_weights=learner)
            self.receivers.append(stack.enter_context(receiver))
        self.model = trained(0)  # the same one for all updates, so that its manifest is no reason to ask
        self.channel = Counting(*self.receivers)
        worker = stack.enter_context(serve(self.channel)).url if over_http else self.channel
        self.sender = stack.enter_context(WeightSender(IPC, [worker]))

    def send(self, seed: int) -> TransferReport:
        rows = [learner.rows for learner in self.learners]
        for learner in self.learners:
            learner.loaded.clear()
        randomise(self.model, seed)
        report = self.sender.send(self.model)
        for learner, own in zip(self.learners, rows, strict=True):
            learner.assert_holds(self.model, own)
        return report

    @property
    def loaded(self) -> list[list[str]]:
        return [sorted(learner.loaded) for learner in self.learners]


New = Callable[..., Session]


@pytest.fixture
def new() -> Iterator[New]:
    with ExitStack() as stack:
        yield lambda *rows, **arguments: Session(stack, *rows, **arguments)


@pytest.mark.parametrize("over_http", [False, True])
def test_targets_that_appear_with_the_first_update_are_used_from_the_second_on(new: New, over_http: bool) -> None:
    session = new(slice(4, 8), over_http=over_http)
    (learner,) = session.learners
    learner.then = slice(4, 8)
    report = session.send(1)
    assert (report.kept, session.loaded, session.channel.questions) == ({}, [[*NAMES]], 1)
    for seed in (2, 1):
        report = session.send(seed)
        assert (sum(report.kept.values()), session.loaded) == (WHOLE_BYTES // 2, [[]])
    assert (session.channel.questions, learner.mappings) == (2, 1), "nothing has changed since"
    assert [answer.get("asks_again") for answer in session.channel.answers] == [True, None, None]


def test_targets_that_change_or_vanish_with_an_update_are_asked_for_again(new: New) -> None:
    session = new(slice(4, 8))
    (learner,) = session.learners
    steps: list[tuple[Any, int, list[str]]] = [
        (slice(4, 8), 0, [*NAMES]),
        (slice(0, 2), WHOLE_BYTES // 2, []),
        (slice(0, 2), WHOLE_BYTES // 4, []),
        (None, WHOLE_BYTES // 4, []),
        (slice(0, 2), 0, [*NAMES]),
        (slice(0, 2), WHOLE_BYTES // 4, []),
    ]
    for seed, (then, kept, loaded) in enumerate(steps):
        learner.then = then
        report = session.send(seed)
        assert (sum(report.kept.values()), session.loaded) == (kept, [loaded])
    assert session.channel.questions == 5
    assert session.receivers[0].version == len(steps) - 1


def test_one_of_two_workers_that_learns_makes_the_trainer_ask_both(new: New) -> None:
    session = new(slice(0, 4), slice(4, 8))
    first, second = session.learners
    first.then = slice(0, 4)
    assert not session.send(1).kept
    assert session.loaded == [[*NAMES]] * 2, "the other one knows nothing yet"
    second.then = slice(4, 8)
    assert not session.send(2).kept
    report = session.send(1)
    assert (sum(report.kept.values()), session.loaded) == (WHOLE_BYTES, [[], []])
    assert session.channel.questions == 3


def test_a_new_mapping_of_the_same_regions_is_no_reason_to_ask(new: New) -> None:
    session = new(slice(4, 8))
    (learner,) = session.learners
    learner.then = slice(4, 8)
    session.send(1)
    session.send(2)
    finish = learner.finish

    def finish_anew() -> None:
        finish()
        learner.said = learner.made()

    learner.finish = finish_anew  # type: ignore[method-assign]
    for seed in (3, 4):
        session.send(seed)
        assert session.loaded == [[]]
    assert session.channel.questions == 2


def test_a_loader_that_cannot_say_any_more_is_heard_before_the_next_first_byte(new: New) -> None:
    session = new(slice(4, 8))
    (learner,) = session.learners
    learner.then = ManifestMismatchError("The model has changed.")
    session.send(1)
    assert session.channel.answers[-1]["asks_again"] is True
    for _ in range(2):
        with pytest.raises(ManifestMismatchError, match="The model has changed"):
            session.sender.send(session.model)
        assert session.receivers[0].version == 0
        learner.assert_holds(trained(1), learner.rows)
    learner.said, learner.then = {}, slice(4, 8)
    session.send(3)
    assert session.send(4).kept


@pytest.mark.parametrize("declared", [False, True])
def test_a_model_that_is_copied_by_name_is_not_looked_at_once_more(
    monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    looks: list[KernelFormatLoader] = []
    weights = KernelFormatLoader.weights

    def look(loader: KernelFormatLoader) -> Any:
        looks.append(loader)
        return weights(loader)

    monkeypatch.setattr(KernelFormatLoader, "weights", look)
    model, served = trained(1), trained(9)
    needs = {"a.weight": Target(Region.whole((8, 6)), served["a"].weight)} if declared else None
    with WeightReceiver(IPC, served, needs=needs) as receiver:
        channel = Counting(receiver)
        with WeightSender(IPC, [channel]) as sender:
            sender.send(model)
            looks.clear()
            sender.send(model)
            assert len(looks) == 1
        assert (channel.questions, channel.answers[-1].get("asks_again")) == (1, None)


@pytest.mark.parametrize("said", [None, False, 1, "yes", []])
def test_only_a_plain_yes_asks_again(said: object) -> None:
    assert not WorkerReport.of({"asks_again": said}).asks_again
    assert WorkerReport.of({"asks_again": True}).asks_again
    assert WorkerReport.of(WorkerReport(asks_again=True).to_dict()) == WorkerReport(asks_again=True)
    assert "asks_again" not in WorkerReport().to_dict()
