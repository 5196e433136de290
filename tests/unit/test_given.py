"""What a loader that a user gives may offer beside being called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weight_transfer import ManifestMismatchError, ModuleSource, TransferError, WeightReceiver, WeightSender
from weight_transfer.session.receiver import ReceiverState

CONFIG = {"backend": "loopback", "timeout": 20}


class Fused(nn.Module):
    """Two weights of the trainer in one parameter, and one that has the trainer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.ab = nn.Parameter(torch.zeros(4, 3))
        self.norm = nn.Parameter(torch.zeros(3))


class Trained(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("a", (2, 3)), ("b", (2, 3)), ("norm", (3,))):
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator)))

    def on(self, model: Fused) -> bool:
        return torch.equal(model.ab, torch.cat([*self.parameters()][:2])) and torch.equal(model.norm, self.norm)


class Loader:
    """Loads a `Fused` model, and writes down how it is called."""

    def __init__(self, model: Fused) -> None:
        self.model = model
        self.log: list[Any] = []
        self.fail_at: str | None = None
        self.returned: Any = {"ab", "norm"}

    def begin(self, manifest: Any) -> None:
        self.log.append(("begin", len(manifest.params)))

    def __call__(self, weights: Any) -> Any:
        for name, tensor in weights:
            if name == self.fail_at:
                raise RuntimeError(f"{name} is broken")
            target = {"a": self.model.ab[:2], "b": self.model.ab[2:], "norm": self.model.norm}[name]
            target.data.copy_(tensor)
        return self.returned

    def finish(self) -> None:
        self.log.append("finish")
        if self.fail_at == "finish":
            raise RuntimeError("finish is broken")

    def abort(self, reason: str, touched: bool) -> None:
        self.log.append(("abort", touched, reason))


class Opened:
    def __init__(self, **options: Any) -> None:
        self.model = Fused()
        self.loader = Loader(self.model)
        self.receiver = WeightReceiver(CONFIG, self.model, load_weights=self.loader, **options)
        self.sender = WeightSender(CONFIG, [self.receiver])


def test_it_is_told_of_the_beginning_and_the_end_of_each_update() -> None:
    opened = Opened()
    for version, seed in enumerate((1, 2, 1), 1):
        opened.sender.send(trained := Trained(seed), version)
        assert trained.on(opened.model)
    assert opened.loader.log == [("begin", 3), "finish"] * 3


@pytest.mark.parametrize("at", ["norm", "finish"])
def test_it_is_told_of_a_failure_once_and_the_next_update_heals_it(at: str) -> None:
    opened = Opened()
    opened.sender.send(Trained(1))
    opened.loader.log.clear()
    opened.loader.fail_at = at
    with pytest.raises(TransferError, match="is broken"):
        opened.sender.send(Trained(2))
    aborts = [entry for entry in opened.loader.log if entry[0] == "abort"]
    assert len(aborts) == 1
    assert aborts[0][1], "it has loaded some weights"
    assert "is broken" in aborts[0][2]
    assert opened.receiver.state is ReceiverState.FAILED
    opened.loader.fail_at = None
    opened.sender.send(trained := Trained(3))
    assert trained.on(opened.model)


def test_a_refusal_is_no_touch_and_the_old_version_is_served() -> None:
    opened = Opened()
    opened.sender.send(trained := Trained(1), 1)

    def refuse(manifest: Any) -> None:
        raise ManifestMismatchError("This is not for me.")

    opened.loader.begin = refuse  # type: ignore[method-assign]
    with pytest.raises(ManifestMismatchError, match="not for me"):
        opened.sender.send(Trained(2))
    assert opened.loader.log[-1][:2] == ("abort", False)
    assert opened.receiver.version == 1
    assert trained.on(opened.model)


def test_a_model_counts_as_spoiled_if_its_loader_cannot_put_back(caplog: pytest.LogCaptureFixture) -> None:
    opened = Opened()
    opened.sender.send(Trained(1), 1)

    def refuse(manifest: Any) -> None:
        raise ManifestMismatchError("This is not for me.")

    def fail(reason: str, touched: bool) -> None:
        raise RuntimeError("cannot put back")

    opened.loader.begin, opened.loader.abort = refuse, fail  # type: ignore[method-assign]
    with pytest.raises(ManifestMismatchError, match="not for me"):
        opened.sender.send(Trained(2))
    assert opened.receiver.version is None
    assert "cannot put back" in caplog.text


def test_a_parameter_that_nobody_has_loaded_is_an_error_before_the_version_is_published() -> None:
    opened = Opened()
    opened.loader.returned = ["ab"]
    with pytest.raises(ManifestMismatchError, match=r"Nothing was loaded into 'norm' .*\(1 parameters in all\)"):
        opened.sender.send(Trained(1))
    assert opened.receiver.version is None
    assert "finish" not in opened.loader.log


@pytest.mark.parametrize("returned", [None, 3, [("a", 1)]])
def test_who_returns_no_names_is_not_asked_for_them(returned: Any) -> None:
    opened = Opened()
    opened.loader.returned = returned
    opened.sender.send(Trained(1), 1)
    assert opened.receiver.version == 1


def test_what_is_ignored_need_not_be_loaded_nor_what_is_tied_to_what_was() -> None:
    opened = Opened(ignore=["no*"])
    opened.model.other_name = opened.model.ab
    opened.loader.returned = {"other_name"}
    opened.sender.send(Trained(1), 1)
    assert opened.receiver.version == 1


def test_names_of_several_calls_are_taken_together() -> None:
    model = nn.ParameterDict({name: torch.zeros(1024) for name in "abc"})
    config = {**CONFIG, "bucket_bytes": 4096}

    def load(weights: Any) -> list[str]:
        for name, tensor in weights:
            model[name].data.copy_(tensor)
        return [name for name, _ in weights]

    receiver = WeightReceiver(config, model, load_weights=load)
    with WeightSender(config, [receiver]) as sender:
        sender.send(nn.ParameterDict({name: torch.ones(1024) for name in "abc"}), 1)
    assert receiver.version == 1


class Keeps(Loader):
    """Places weights when all have come, as loaders do that process a layer once it is complete."""

    retains = True

    def begin(self, manifest: Any) -> None:
        self.kept: Any = []

    def __call__(self, weights: Any) -> None:
        self.kept += weights

    def finish(self) -> None:
        super().__call__(self.kept)


def test_a_loader_that_keeps_tensors_and_says_so_has_copies_of_its_own() -> None:
    model = Fused()
    with (
        WeightReceiver(CONFIG, model, load_weights=Keeps(model)) as receiver,
        WeightSender(CONFIG, [receiver]) as sender,
    ):
        for seed in (1, 2, 1):
            sender.send(trained := Trained(seed))
            assert trained.on(model)


def test_one_that_does_not_say_so_is_refused_and_told_how() -> None:
    model = Fused()
    loader = Keeps(model)
    loader.retains = False  # type: ignore[misc]
    with WeightReceiver(CONFIG, model, load_weights=loader) as receiver, WeightSender(CONFIG, [receiver]) as sender:
        with pytest.raises(TransferError, match=r"has kept .*load_weights\.retains = True"):
            sender.send(Trained(1))
        assert receiver.version is None


def test_one_that_names_some_and_not_others_is_not_asked() -> None:
    for first in (True, False):
        model = nn.ParameterDict({name: torch.zeros(1024) for name in "ab"})
        calls: list[Any] = []

        def load(weights: Any, calls: list[Any] = calls, first: bool = first) -> Any:
            calls.append(weights[0][0])
            return ["a"] if (len(calls) == 1) is first else None

        receiver = WeightReceiver({**CONFIG, "bucket_bytes": 4096}, model, load_weights=load)
        with WeightSender({**CONFIG, "bucket_bytes": 4096}, [receiver]) as sender:
            sender.send(nn.ParameterDict({name: torch.ones(1024) for name in "ab"}), 1)
        assert len(calls) == 2
        assert receiver.version == 1


class Direct:
    """Lets engines write into the model, and returns names if it is called all the same."""

    def __init__(self, model: nn.ParameterDict) -> None:
        self.own = {name: parameter.data for name, parameter in model.items()}

    def __call__(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            if self.own[name] is not tensor:
                self.own[name].copy_(tensor)
        return {name for name, _ in weights}

    def destinations(self) -> Any:
        return self.own


@pytest.mark.parametrize("count", [15, 16])
def test_what_an_engine_has_written_in_place_needs_no_names(count: int) -> None:
    names = [f"p{number}" for number in range(count)]
    model = nn.ParameterDict({name: torch.zeros(3) for name in names})
    config = {**CONFIG, "backend": "ipc"}
    with (
        WeightReceiver(config, model, load_weights=Direct(model)) as receiver,
        WeightSender(config, [receiver]) as sender,
    ):
        sender.send(nn.ParameterDict({name: torch.ones(3) for name in names}), 1)
        assert receiver.version == 1
        assert all(bool((model[name] == 1).all()) for name in names)


def test_nobody_samples_while_a_loader_says_what_it_keeps_if_that_disturbs_the_model() -> None:
    opened = Opened()
    inside: list[bool] = []

    def targets(manifest: Any) -> Any:
        inside.append(opened.receiver._served.held_back)
        return {}

    opened.loader.targets, opened.loader.disturbs = targets, True  # type: ignore[attr-defined]
    opened.sender.send(trained := Trained(1), 1)
    inside.clear()
    manifest = ModuleSource(trained).manifest()
    needs = {"manifest": {"digest": manifest.digest, "value": manifest.to_wire()}, "timeout": 5.0}
    session = {"session": opened.receiver._lifecycle.session}
    assert opened.receiver.weight_needs({**needs, **session}) == {"needs": [None]}
    assert inside == [True]
    assert opened.receiver.version == 1


def test_what_it_warns_of_stands_in_the_report() -> None:
    opened = Opened()
    opened.loader.warnings = ["It was slow."]  # type: ignore[attr-defined]
    report = opened.sender.send(Trained(1))
    assert "It was slow." in str(report.warnings)


def test_a_target_that_is_taken_in_later_has_a_version_of_its_own() -> None:
    opened, draft = Opened(), Fused()
    opened.sender.send(Trained(1), 1)
    with pytest.raises(ManifestMismatchError, match="for target 'draft'"):
        opened.sender.send(Trained(2), 2, target="draft")
    opened.receiver.add_target("draft", draft, Loader(draft))
    opened.sender.send(trained := Trained(2), 2, target="draft")
    assert trained.on(draft)
    assert opened.receiver.versions == {"model": 1, "draft": 2}
    other = Fused()
    opened.receiver.add_target("draft", other, Loader(other))
    assert opened.receiver.versions == {"model": 1, "draft": None}
    opened.sender.send(trained := Trained(3), 3, target="draft")
    assert trained.on(other)
    assert not trained.on(draft)
