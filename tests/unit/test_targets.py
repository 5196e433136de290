"""Several models behind one receiver, and updates of some weights: each model has a version, which covers all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from support.models import digest
from weight_transfer import (
    ConfigError,
    LocalChannel,
    ManifestMismatchError,
    ModuleSource,
    ParallelConfig,
    ReceiverState,
    ReplacedError,
    TransferError,
    WeightReceiver,
    WeightSender,
    WeightSource,
)
from weight_transfer.model.partial import PartialSource

LOOPBACK = {"backend": "loopback", "timeout": 10, "bucket_bytes": 256}


def policy(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def draft(seed: int) -> nn.Module:
    torch.manual_seed(100 + seed)
    return nn.Sequential(nn.Linear(3, 3))


class Pair:
    """A worker with a model and a draft, and its trainer."""

    def __init__(self, **config: Any) -> None:
        self.model, self.draft = policy(0), draft(0)
        self.receiver = WeightReceiver(LOOPBACK | config, self.model, targets={"draft": self.draft})
        self.sender = WeightSender(LOOPBACK | config, [self.receiver])

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    result = Pair()
    yield result
    result.close()


def test_each_target_has_its_weights_and_its_version(pair: Pair) -> None:
    for round_ in range(3):
        report = pair.sender.send(policy(round_), version=f"m{round_}")
        assert report.target == "model"
        assert pair.sender.send(draft(round_), version=f"d{round_}", target="draft").target == "draft"
        assert digest(pair.model) == digest(policy(round_))
        assert digest(pair.draft) == digest(draft(round_))
        assert pair.receiver.versions == {"model": f"m{round_}", "draft": f"d{round_}"}
        assert pair.receiver.status()["versions"] == pair.receiver.versions
        assert pair.receiver.version == pair.sender.version == f"m{round_}"


def test_targets_count_their_versions_apart(pair: Pair) -> None:
    versions = [pair.sender.send(policy(1)).version, pair.sender.send(draft(1), target="draft").version]
    versions += [pair.sender.send(policy(2)).version, pair.sender.send(draft(2), target="draft").version]
    assert versions == [0, 0, 1, 1]
    with WeightSender(LOOPBACK, [pair.receiver]) as successor:
        assert successor.send(draft(3), target="draft").version == 2
        assert successor.send(policy(3)).version == 2


def test_a_target_that_the_worker_has_not_is_named_and_nothing_is_lost(pair: Pair) -> None:
    pair.sender.send(policy(1))
    with pytest.raises(ManifestMismatchError, match=r"for target 'critic', but this worker has 'model', 'draft'"):
        pair.sender.send(policy(2), target="critic")
    assert pair.receiver.version == 0
    assert digest(pair.model) == digest(policy(1))


@pytest.mark.parametrize("name", ["model", "", 3])
def test_a_target_needs_a_name_of_its_own(name: Any) -> None:
    with pytest.raises(ConfigError, match="is no name for a further model"):
        WeightReceiver(LOOPBACK, policy(0), targets={name: draft(0)})


def test_targets_are_models_by_name() -> None:
    with pytest.raises(ConfigError, match=r"targets: expected models by name, .* got \['draft'\]"):
        WeightReceiver(LOOPBACK, policy(0), targets=["draft"])  # type: ignore[arg-type]


def test_a_target_is_a_module() -> None:
    with pytest.raises(ConfigError, match=r"targets: draft: expected the nn\.Module that serves, got str"):
        WeightReceiver(LOOPBACK, policy(0), targets={"draft": "a path"})  # type: ignore[dict-item]


class Failing(WeightSource):
    """Raises after its first weight."""

    def __init__(self, module: nn.Module) -> None:
        self._source = ModuleSource(module)

    def manifest(self) -> Any:
        return self._source.manifest()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(self._source))
        raise OSError("the disk is gone")


def test_nothing_is_served_while_one_of_the_models_is_torn(pair: Pair) -> None:
    large = nn.Sequential(nn.Linear(30, 30))
    receiver = WeightReceiver(LOOPBACK, pair.model, targets={"draft": large})
    with receiver, WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(policy(1))
        sender.send(nn.Sequential(nn.Linear(30, 30)), target="draft")
        with pytest.raises(TransferError, match="the disk is gone"):
            sender.send(Failing(nn.Sequential(nn.Linear(30, 30))), target="draft")
        assert receiver.state is ReceiverState.FAILED
        assert receiver.version is None
        assert receiver.versions == {"model": 0, "draft": None}
        sender.send(policy(2))
        assert receiver.version is None, "the draft is still torn"
        sender.send(nn.Sequential(nn.Linear(30, 30)), target="draft")
        assert receiver.version == 1
        assert digest(pair.model) == digest(policy(2))


def test_ranks_of_a_replica_tell_the_version_that_all_have() -> None:
    receivers = [
        WeightReceiver(
            LOOPBACK,
            policy(0),
            targets={"draft": draft(0)},
            parallel_config=ParallelConfig(rank=rank, world_size=2),
        )
        for rank in range(2)
    ]
    assert LocalChannel(*receivers).status()["versions"] == {"model": None, "draft": None}
    with WeightSender(LOOPBACK, [LocalChannel(*receivers)]) as sender:
        sender.send(draft(1), version=4, target="draft")
    assert LocalChannel(*receivers).status()["versions"] == {"model": None, "draft": 4}


# Some of the weights.


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("verify", ["none", "wire"])
def test_some_weights_are_sent_and_the_others_stay(verify: str) -> None:
    pair = Pair(verify=verify)
    a, b = policy(1), policy(2)
    pair.sender.send(a)
    report = pair.sender.send(b, only=["1.*", "2.bias"])
    assert report.params == 3
    assert report.version == pair.receiver.version == 1
    assert same(pair.model, state(a) | {n: t for n, t in state(b).items() if n.startswith("1.") or n == "2.bias"})
    pair.sender.send(a, only=["1.*"])
    pair.sender.send(a, only=["2.*"])
    assert same(pair.model, state(a))
    pair.sender.send(b)
    assert same(pair.model, state(b))
    pair.close()


def test_some_weights_of_a_target(pair: Pair) -> None:
    pair.sender.send(draft(1), target="draft")
    pair.sender.send(draft(2), target="draft", only=["0.bias"])
    assert same(pair.draft, state(draft(1)) | {"0.bias": state(draft(2))["0.bias"]})
    assert pair.receiver.versions == {"model": None, "draft": 1}


def test_a_part_is_never_put_to_weights_of_another_trainer(pair: Pair) -> None:
    pair.sender.send(policy(1), version=1)
    with WeightSender(LOOPBACK, [pair.receiver]) as other:
        other.send(policy(2), version=1)
        with pytest.raises(ReplacedError):
            pair.sender.send(policy(1), version=1, only=["0.*"])
        assert pair.receiver.version == 1
        assert same(pair.model, state(policy(2)))
        other.send(policy(3), version=1)
        other.send(policy(3), version=1, only=["0.*"])


def test_a_worker_that_was_restarted_needs_all_weights_first(pair: Pair) -> None:
    pair.sender.send(policy(1))
    fresh = WeightReceiver(LOOPBACK, policy(9))
    pair.sender.add_worker(fresh)
    with pytest.raises(ManifestMismatchError, match="this worker has none that are whole; send all of them first"):
        pair.sender.send(policy(2), only=["0.*"])
    assert fresh.version is None
    pair.sender.send(policy(2))
    assert fresh.version == pair.receiver.version == 1


def test_a_part_after_a_failed_update_is_refused() -> None:
    model = nn.Sequential(nn.Linear(30, 30))
    with WeightReceiver(LOOPBACK, model) as receiver, WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(nn.Sequential(nn.Linear(30, 30)))
        with pytest.raises(TransferError, match="the disk is gone"):
            sender.send(Failing(nn.Sequential(nn.Linear(30, 30))))
        assert receiver.version is None
        with pytest.raises(ManifestMismatchError, match="send all of them first"):
            sender.send(nn.Sequential(nn.Linear(30, 30)), only=["0.bias"])
        assert receiver.version is None
        sender.send(nn.Sequential(nn.Linear(30, 30)))
        assert receiver.version == 1


def test_a_first_update_of_some_weights_is_refused(pair: Pair) -> None:
    need = "The workers need all weights before they can be sent some"
    with pytest.raises(ConfigError, match=need):
        pair.sender.send(policy(1), only=["0.*"])
    with pytest.raises(ConfigError, match=need):
        pair.sender.send(PartialSource(ModuleSource(policy(1)), ["0.*"]))
    assert pair.receiver.version is None


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    "change",
    [lambda info: info.pop("base"), lambda info: info.update(base="another")],
    ids=["no base", "another base"],
)
def test_a_part_without_the_version_that_it_belongs_to_is_refused(
    pair: Pair, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.sender.send(policy(1))
    honest = pair.receiver.update_weights

    def changed(info: dict[str, Any]) -> dict[str, Any]:
        change(info)
        return honest(info)

    monkeypatch.setattr(pair.receiver, "update_weights", changed)
    with pytest.raises(ManifestMismatchError, match="send all of them first"):
        pair.sender.send(policy(2), only=["0.*"])
    assert same(pair.model, state(policy(1)))


def test_a_part_is_not_put_to_older_weights_of_a_version_that_is_used_again(pair: Pair) -> None:
    """A name such as "latest" for each version says nothing of the weights that a lost worker has."""
    lost = policy(9)
    with (
        WeightReceiver(LOOPBACK, lost) as receiver,
        WeightSender(LOOPBACK | {"on_worker_failure": "continue"}, [pair.receiver, receiver]) as sender,
    ):
        sender.send(policy(1), version="latest")
        sender.remove_worker(receiver)
        sender.send(policy(2), version="latest")
        sender.add_worker(receiver)
        with pytest.raises(ManifestMismatchError, match="send all of them first"):
            sender.send(policy(3), version="latest", only=["0.*"])
        assert same(lost, state(policy(1)))


def test_a_part_of_a_layer_that_is_processed_after_loading_is_refused() -> None:
    """The rest of the layer would be processed twice."""

    def double(layer: nn.Module) -> None:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(2)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    sent = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with (
        WeightReceiver(LOOPBACK, model, process_weights_after_loading=double) as receiver,
        WeightSender(LOOPBACK, [receiver]) as sender,
    ):
        sender.send(sent)
        with pytest.raises(ManifestMismatchError, match=r"layer '1' came without the others.*send whole layers"):
            sender.send(sent, only=["1.weight"])
        assert receiver.version == 0
        for only in (["1.*"], ["0.*"], ["0.*", "1.*"]):
            sender.send(sent, only=only)
            for mine, theirs in zip(model.parameters(), sent.parameters(), strict=True):
                assert torch.equal(mine, 2 * theirs)


def test_a_weight_that_is_missing_without_being_declared_is_an_error(pair: Pair) -> None:
    pair.sender.send(policy(1))
    with pytest.raises(ManifestMismatchError, match="are missing from the update"):
        pair.sender.send(ModuleSource(policy(2), rename=lambda name: None if name.startswith("1.") else name))
    assert pair.receiver.version == 0
