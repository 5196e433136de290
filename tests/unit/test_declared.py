"""What a user has declared: every byte goes where the declaration says, and what cannot be right is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer import ConfigError, ManifestMismatchError, ParallelConfig, Region, Target
from weight_transfer.model.targets import RegionLoader

CONFIG: dict[str, Any] = {"backend": "loopback", "timeout": 20, "bucket_bytes": 512}
IPC: dict[str, Any] = {"backend": "ipc", "timeout": 20, "bucket_bytes": "4KiB"}


class Trained(nn.Module):
    """Weights as a trainer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=False)
        self.k = nn.Linear(8, 4, bias=False)
        self.down = nn.Linear(7, 8)
        self.norm = nn.LayerNorm(8)

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.parameters():
            tensor.data = torch.randn(tensor.shape, generator=generator)


class Half(nn.Module):
    """One of two tensor parallel ranks: q and k are fused, rows of them and columns of ``down`` are split."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.qk = nn.Parameter(torch.full((6, 8), torch.nan))
        self.down = nn.Linear(4 if rank == 0 else 3, 8)
        self.norm = nn.LayerNorm(8)

    def needs(self) -> dict[str, Target]:
        return {
            "q.weight": Target(Region.split((8, 8), 0, self.rank, 2), self.qk[:4]),
            "k.weight": Target(Region.split((4, 8), 0, self.rank, 2), self.qk[4:]),
            "down.weight": Target(Region.split((8, 7), 1, self.rank, 2), self.down.weight),
        }

    def assert_is_part_of(self, trained: Trained) -> None:
        q, k = trained.q.weight.chunk(2)[self.rank], trained.k.weight.chunk(2)[self.rank]
        assert torch.equal(self.qk, torch.cat([q, k]))
        assert torch.equal(self.down.weight, trained.down.weight.chunk(2, dim=1)[self.rank])
        assert torch.equal(self.down.bias, trained.down.bias)
        assert torch.equal(self.norm.weight, trained.norm.weight)


@pytest.mark.parametrize("config", [CONFIG, IPC, IPC | {"verify": "wire"}], ids=["loopback", "ipc", "ipc, verified"])
@pytest.mark.parametrize("is_checkpoint_format", [True, False])
def test_each_of_two_workers_keeps_its_part(config: dict[str, Any], is_checkpoint_format: bool) -> None:
    config = config | {"is_checkpoint_format": is_checkpoint_format}
    halves = [Half(0), Half(1)]
    receivers = [
        wt.WeightReceiver(
            config, half, needs=half.needs(), parallel_config=ParallelConfig(rank=half.rank, world_size=2)
        )
        for half in halves
    ]
    trained = Trained()
    with wt.WeightSender(config, [wt.LocalChannel(*receivers)]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            trained.randomise(seed)
            sender.send(trained, version=version)
            for half in halves:
                half.assert_is_part_of(trained)
    for receiver in receivers:
        receiver.close()


@pytest.mark.parametrize("config", [CONFIG, IPC], ids=["loopback", "ipc"])
def test_a_function_is_asked_once_for_each_manifest(config: dict[str, Any]) -> None:
    half, asked, trained = Half(1), [], Trained()

    def needs(manifest: wt.Manifest) -> dict[str, Target]:
        asked.append(manifest)
        return half.needs()

    with wt.WeightReceiver(config, half, needs=needs) as receiver, wt.WeightSender(config, [receiver]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            trained.randomise(seed)
            sender.send(trained, version=version)
            half.assert_is_part_of(trained)
        assert len(asked) == 1
        half.qk.data = torch.zeros(6, 8)  # the views of before lie elsewhere now
        sender.send(trained, version="moved")
        half.assert_is_part_of(trained)
        assert len(asked) == 2


def test_a_weight_with_targets_never_goes_to_load_weights() -> None:
    half, trained, loaded = Half(0), Trained(), []

    def load_weights(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            loaded.append(name)
            if name.startswith("norm"):
                half.norm.get_parameter(name.removeprefix("norm.")).data.copy_(tensor)

    receiver = wt.WeightReceiver(
        CONFIG, half, load_weights=load_weights, needs={**half.needs(), "down.bias": half_bias(half)}
    )
    with receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
    assert sorted(loaded) == ["norm.bias", "norm.weight"]
    half.assert_is_part_of(trained)


def half_bias(half: Half) -> Target:
    return Target(Region.whole((8,)), half.down.bias)


def test_experts_that_are_not_kept_are_dropped_and_those_that_are_need_no_place_of_their_own() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked = nn.Parameter(torch.zeros(2, 3, 5))

    served, trained = Experts(), nn.ParameterDict({f"e{i}": torch.randn(3, 5) for i in range(4)})
    needs: dict[str, Any] = {f"e{i}": [] for i in (0, 1)}
    needs |= {f"e{i}": [Target(Region.whole((3, 5)), served.stacked[i - 2])] for i in (2, 3)}
    with wt.WeightReceiver(CONFIG, served, needs=needs) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
    assert torch.equal(served.stacked, torch.stack([trained["e2"], trained["e3"]]))


def test_a_part_of_the_weights_may_be_sent() -> None:
    half, trained = Half(0), Trained()
    with wt.WeightReceiver(CONFIG, half, needs=half.needs()) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
        trained.randomise(3)
        sender.send(trained, version=2, only=["k.*", "down.weight", "down.bias", "norm.*"])
        assert torch.equal(half.qk[4:], trained.k.weight[:2])
        assert not torch.equal(half.qk[:4], trained.q.weight[:4])
        sender.send(trained, version=3, only=["q.*"])
        half.assert_is_part_of(trained)


def test_what_is_tied_on_the_trainer_may_be_declared_under_each_name() -> None:
    trained = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    trained["head"].weight = trained["embed"].weight
    served = nn.ParameterDict({"vocabulary": torch.zeros(3, 4), "logits": torch.zeros(3, 4)})
    needs = {
        "embed.weight": Target(Region.split((6, 4), 0, 1, 2), served["vocabulary"]),
        "head.weight": Target(Region.split((6, 4), 0, 0, 2), served["logits"]),
    }
    with wt.WeightReceiver(CONFIG, served, needs=needs) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
    weight = trained["embed"].weight
    assert torch.equal(served["vocabulary"], weight[3:])
    assert torch.equal(served["logits"], weight[:3])


def test_targets_may_be_made_in_inference_mode() -> None:
    with torch.inference_mode():
        half, trained = Half(1), Trained()
        needs = half.needs()
    with wt.WeightReceiver(CONFIG, half, needs=needs) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
    half.assert_is_part_of(trained)


def test_a_cast_may_follow_the_targets() -> None:
    half = Half(0).bfloat16()
    trained = Trained()
    config = CONFIG | {"cast": {"*": "receiver"}}
    with wt.WeightReceiver(config, half, needs=half.needs()) as receiver, wt.WeightSender(config, [receiver]) as sender:
        sender.send(trained, version=1)
    half.assert_is_part_of(trained.bfloat16())


def _unlike(half: Half, **changed: Any) -> dict[str, Any]:
    return half.needs() | {name.replace("_", "."): value for name, value in changed.items()}


REFUSED_AT_ONCE: dict[str, tuple[Callable[[Half], Any], str]] = {
    "a list": (lambda half: [half.qk], "expected targets by name"),
    "no target": (
        lambda half: _unlike(half, q_weight=half.qk[:4]),
        "expected a Target or a list of them for 'q.weight'",
    ),
    "memory that is another's": (
        lambda half: _unlike(half, k_weight=Target(Region((0, 0), (2, 8)), half.qk[3:5])),
        r"the target of q.weight \[0:4, 0:8\] shares memory with k.weight \[0:2, 0:8\]",
    ),
    "memory that is another's, of a region that is declared twice": (
        lambda half: {
            "down.bias": [
                Target(Region((0,), (8,)), tensor) for tensor in (half.down.bias, half.norm.bias, half.norm.weight)
            ],
            "norm.bias": Target(Region((0,), (8,)), half.norm.bias),
        },
        r"the target of \S+.bias \[0:8\] shares memory with \S+.bias \[0:8\]",
    ),
    "one place for several elements": (
        lambda half: {"down.bias": Target(Region((0,), (8,)), half.down.bias[:1].expand(8))},
        "down.bias .* has several elements in one place",
    ),
    "the meta device": (
        lambda half: {"q.weight": Target(Region((0, 0), (4, 8)), torch.empty(4, 8, device="meta"))},
        "'q.weight' lies on the meta device",
    ),
    "a quantised tensor": (
        lambda half: {
            "q.weight": Target(
                Region((0, 0), (4, 8)), torch.quantize_per_tensor(torch.zeros(4, 8), 1.0, 0, torch.qint8)
            )
        },
        "'q.weight' is quantised",
    ),
    "a sparse tensor": (
        lambda half: {"q.weight": Target(Region((0, 0), (4, 8)), torch.zeros(4, 8).to_sparse())},
        "'q.weight' is quantised, sharded or otherwise no plain tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_a_wrong_declaration_is_refused_when_the_receiver_is_made(case: str) -> None:
    needs, words = REFUSED_AT_ONCE[case]
    half = Half(0)
    with pytest.raises(ConfigError, match=words):
        wt.WeightReceiver(CONFIG, half, needs=needs(half))


def test_another_device_than_the_models_is_refused() -> None:
    served = nn.Linear(4, 4, device="meta")
    with pytest.raises(ConfigError, match="'weight' lies on cpu, and the model on meta"):
        wt.WeightReceiver(CONFIG, served, needs={"weight": Target(Region.whole((4, 4)), torch.zeros(4, 4))})


def test_layers_that_are_processed_are_refused() -> None:
    half = Half(0)
    with pytest.raises(ConfigError, match="needs and process_weights_after_loading do not go together"):
        wt.WeightReceiver(CONFIG, half, needs=half.needs(), process_weights_after_loading=lambda layer: None)


def _without(half: Half, *names: str) -> dict[str, Any]:
    return {name: target for name, target in half.needs().items() if name not in names}


REFUSED_WITH_WEIGHTS: dict[str, tuple[Callable[[Half], Any], str]] = {
    "an unknown name": (
        lambda half: half.needs() | {"q.wieght": []},
        "needs declares a target of 'q.wieght', which the trainer does not send; did you mean 'q.weight'?",
    ),
    "a region beyond its weight": (
        lambda half: _unlike(half, q_weight=Target(Region((5, 0), (4, 8)), half.qk[:4])),
        r"needs declares \[5:9, 0:8\] of q.weight: float32 \[8, 8\], which lies beyond it",
    ),
    "another number of dimensions": (
        lambda half: _unlike(half, q_weight=Target(Region((0,), (32,)), half.qk[:4].view(32))),
        "which lies beyond it",
    ),
    "another dtype": (
        lambda half: half.needs() | {"down.bias": Target(Region((0,), (8,)), torch.zeros(8).bfloat16())},
        "down.bias: float32 .* was sent, but its target on the worker has bfloat16.* declare it on the trainer: cast",
    ),
    "a fused weight of which a part is missing": (
        lambda half: _without(half, "k.weight") | {"k.weight": []},
        "Targets are declared for 128 of the 192 bytes of 'qk'",
    ),
    "a weight that would come twice": (
        lambda half: half.needs() | {"norm.bias": Target(Region((0,), (8,)), half.norm.weight)},
        "The target of 'norm.bias' lies in 'norm.weight' of the worker's model, which is sent by its own name, too",
    ),
    "a weight of the model that nobody fills": (
        lambda half: {name: [] for name in ("q.weight", "k.weight")} | {"down.weight": half.needs()["down.weight"]},
        "'qk' is missing from the update",
    ),
    "a weight without target that the model has not": (
        lambda half: {"down.weight": half.needs()["down.weight"]},
        "'q.weight' and 1 more do not exist in the worker's model",
    ),
}


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("case", REFUSED_WITH_WEIGHTS)
def test_a_declaration_that_does_not_fit_is_refused_before_the_first_byte(case: str, is_function: bool) -> None:
    make, words = REFUSED_WITH_WEIGHTS[case]
    half, trained = Half(0), Trained()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    needs = make(half)
    given = (lambda manifest: needs) if is_function else needs
    with wt.WeightReceiver(CONFIG, half, needs=given) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        with pytest.raises(ManifestMismatchError, match=words):
            sender.send(trained, version=1)
        assert receiver.state in (wt.ReceiverState.READY, wt.ReceiverState.CREATED)
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("own_loader", [False, True])
def test_views_of_a_weight_that_was_moved_are_refused(own_loader: bool) -> None:
    half, trained = Half(0), Trained()
    load = (lambda weights: None) if own_loader else None
    receiver = wt.WeightReceiver(CONFIG, half, needs=half.needs(), load_weights=load)
    with receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
        half.qk.data = half.qk.data.clone()
        with pytest.raises(ManifestMismatchError, match=r"target of 'q.weight' lies where .* before it was moved"):
            sender.send(trained, version=2)


def test_a_parameter_that_is_a_target_itself_may_move() -> None:
    half, trained = Half(0), Trained()
    with wt.WeightReceiver(CONFIG, half, needs=half.needs()) as receiver, wt.WeightSender(CONFIG, [receiver]) as sender:
        sender.send(trained, version=1)
        half.down.weight.data = torch.zeros(8, 4)
        trained.randomise(2)
        sender.send(trained, version=2)
        half.assert_is_part_of(trained)


def test_targets_are_the_same_object_while_nothing_changes() -> None:
    from weight_transfer.model.checkpoint_loading import loader_for
    from weight_transfer.model.declared import declared_for

    half = Half(0)
    manifest = wt.ModuleSource(Trained()).manifest()
    loader = declared_for(half.needs(), half, loader_for(half, None, None))[True]
    assert isinstance(loader, RegionLoader)
    targets = loader.targets(manifest)
    loader.begin(manifest)
    assert loader.targets(manifest) is targets
    assert targets.keys() == {*half.needs(), "down.bias", "norm.weight", "norm.bias"}
