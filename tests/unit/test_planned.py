"""A loader that copies by a recording: the model's bits are those that its own loader makes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from weight_transfer import Manifest, ManifestMismatchError, ParamMeta
from weight_transfer.model.planned import PlannedLoader

SENT = {
    "q": (8, 6),
    "k": (8, 6),
    "v": (8, 6),
    "down": (6, 8),
    "norm": (6,),
    "packed": (8, 6),
    "expert.0": (5, 6),
    "expert.1": (5, 6),
    "odd": (6,),
    "odd_scale": (6,),
    "head": (8, 6),
}
"""What the trainer has; the head is tied to something that no rank keeps apart."""


def weights_of(seed: int, without: Collection[str] = ()) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator)) for name, shape in SENT.items() if name not in without]


def manifest_of(weights: list[tuple[str, Tensor]], partial: bool = False) -> Manifest:
    return Manifest([ParamMeta(name, "float32", tuple(tensor.shape)) for name, tensor in weights], partial=partial)


class Served:
    """One of two tensor-parallel ranks. Layer ``packed`` serves its weight transposed, and ``odd`` computes to load.

    Attributes:
        serving: what the kernels read, by name; its tensors stay the same.
        fail_at: a layer whose processing raises.
    """

    FORMS: ClassVar = {
        "attn.qkv": (12, 6),
        "mlp.down": (6, 4),
        "norm.weight": (6,),
        "packed.weight": (4, 6),
        "experts.weight": (5, 6),
        "odd.a": (6,),
        "odd.scale": (6,),
    }

    def __init__(self, rank: int, listed: Collection[str] = ("attn", "mlp", "norm", "packed", "experts")) -> None:
        self.rank = rank
        self.listed = listed
        self.serving = {name: torch.zeros(shape) for name, shape in self.FORMS.items()}
        self.serving["packed.weight"] = torch.zeros(6, 4)
        self.fail_at = ""
        self.loading: dict[str, Tensor] = {}
        self.log: list[str] = []

    def own_loader(self, weights: Any) -> None:
        rows = slice(4 * self.rank, 4 * self.rank + 4)
        for name, tensor in weights:
            if name in "qkv":
                self._load("attn.qkv", tensor[rows], slice(4 * "qkv".index(name), 4 * "qkv".index(name) + 4))
            elif name == "down":
                self._load("mlp.down", tensor[:, rows])
            elif name == "packed":
                self._load("packed.weight", tensor.chunk(2)[self.rank])
            elif name == f"expert.{self.rank}":
                self._load("experts.weight", tensor)
            elif name == "odd":
                self._load("odd.a", -torch.exp(tensor))
            elif name in ("norm", "odd_scale"):
                self._load("norm.weight" if name == "norm" else "odd.scale", tensor)

    def _load(self, name: str, tensor: Tensor, where: Any = slice(None)) -> None:
        self.loading[name][where].copy_(tensor)

    def made_of(self, weights: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return what serves after the model's own loader has taken all weights."""
        other = Served(self.rank)
        other.loading = {name: torch.zeros(shape) for name, shape in self.FORMS.items()}
        other.own_loader(weights)
        other.loading["packed.weight"] = other.loading["packed.weight"].t().contiguous()
        return other.loading

    @contextmanager
    def recorded(self) -> Iterator[Any]:
        self.loading = {name: torch.empty(shape, device="meta") for name, shape in self.FORMS.items()}
        yield self.own_loader, self.loading
        self.loading = {}

    def layer_of(self, name: str) -> str:
        return name.partition(".")[0]

    def required(self) -> Collection[str]:
        return self.FORMS

    def optional(self) -> Collection[str]:
        return ()

    def split(self) -> tuple[int, int]:
        return self.rank, 2

    def state(self) -> object:
        return self.rank

    def by_loader(self) -> Mapping[str, str]:
        return {}

    def in_place(self) -> Mapping[str, Tensor]:
        return {name: tensor for name, tensor in self.serving.items() if self.layer_of(name) in self.listed}

    def open(self, directly: Collection[str]) -> None:
        self.log.append(f"open {' '.join(sorted(directly))}".strip())

    def begin_layer(self, layer: str) -> Mapping[str, Tensor]:
        self.log.append(f"begin {layer}")
        begun = {name: torch.full(shape, 7.0) for name, shape in self.FORMS.items() if self.layer_of(name) == layer}
        self.loading |= begun
        return begun

    def end_layer(self, layer: str) -> bool:
        if layer == self.fail_at:
            raise RuntimeError(f"{layer} cannot be processed")
        self.log.append(f"end {layer}")
        for name in [name for name in self.loading if self.layer_of(name) == layer]:
            tensor = self.loading.pop(name)
            self.serving[name].copy_(tensor.t() if layer == "packed" else tensor)
        return layer != "packed"

    def load(self, weights: Any) -> None:
        for name in ("odd.a", "odd.scale"):
            self.loading.setdefault(name, torch.zeros(6))
        self.log.append(f"load {' '.join(name for name, _ in weights)}")
        self.own_loader(weights)

    def finish(self) -> None:
        self.log.append("finish")
        for name in list(self.loading):
            self.serving[name].copy_(self.loading.pop(name))

    def restore(self, reason: str) -> None:
        self.log.append("restore")
        self.loading = {}


def send(loader: PlannedLoader, weights: list[tuple[str, Tensor]], part: int = 3, manifest: Any = None) -> None:
    loader.begin(manifest or manifest_of(weights))
    for start in range(0, len(weights), part):
        lent = [(name, tensor.clone()) for name, tensor in weights[start : start + part]]
        loader(lent)
        for _, tensor in lent:
            tensor.fill_(float("nan"))
    loader.finish()


def require_bits(served: Served, weights: list[tuple[str, Tensor]]) -> None:
    expected = served.made_of(weights)
    for name, tensor in served.serving.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", [1, 3, 100])
def test_every_bit_is_the_own_loaders_from_a_to_b_and_back(rank: int, part: int) -> None:
    served = Served(rank)
    loader = PlannedLoader(served)
    for seed in (1, 2, 1):
        send(loader, weights := weights_of(seed), part)
        require_bits(served, weights)


def test_weights_may_come_in_any_order() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    for seed in (1, 2):
        send(loader, weights := weights_of(seed)[::-1], 2)
        require_bits(served, weights)


def test_a_layer_that_computes_is_left_to_the_models_loader_whole_and_the_report_says_so() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    send(loader, weights_of(1))
    taken = [name for line in served.log if line.startswith("load") for name in line.split()[1:]]
    assert sorted(taken) == ["odd", "odd_scale"]
    assert "begin odd" not in served.log
    (warning,) = loader.warnings
    assert warning.startswith("1 layers are loaded by the model's own loader, which is slower: 'odd', since ")


def test_layers_that_processing_does_not_change_are_written_directly_from_the_second_update_on() -> None:
    served = Served(1)
    loader = PlannedLoader(served)
    assert loader.targets(manifest_of(weights_of(1))).keys() == {"head", "expert.0"}, "what it needs nothing of"
    send(loader, weights_of(1))
    served.log.clear()
    send(loader, weights := weights_of(2))
    require_bits(served, weights)
    assert served.log[0] == "open attn experts mlp norm"
    assert {line for line in served.log if line.startswith("begin")} == {"begin packed"}


def test_targets_are_regions_of_the_serving_tensors_and_stay_the_same_object() -> None:
    served = Served(1)
    loader = PlannedLoader(served)
    manifest = manifest_of(weights := weights_of(1))
    send(loader, weights, manifest=manifest)
    targets = loader.targets(manifest)
    assert loader.targets(manifest) is targets
    assert targets.keys() == SENT.keys() - {"packed", "odd", "odd_scale"}
    assert {str(target.region) for target in targets["down"]} == {"[0:6, 4:8]"}
    assert not targets["expert.0"]
    weights = weights_of(2)
    loader.begin(manifest)
    for name, tensor in weights:
        for target in targets.get(name, ()):
            target.tensor.copy_(tensor[target.region.slices])
    loader([(name, tensor) for name, tensor in weights if name not in targets])
    loader.finish()
    require_bits(served, weights)


def test_targets_follow_tensors_that_have_moved() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    manifest = manifest_of(weights := weights_of(1))
    send(loader, weights, manifest=manifest)
    before = loader.targets(manifest)
    served.serving["mlp.down"] = served.serving["mlp.down"].clone()
    after = loader.targets(manifest)
    assert after is not before
    assert after["down"][0].tensor.data_ptr() == served.serving["mlp.down"].data_ptr()


def test_whole_weights_have_a_place_where_they_may_be_written_at_once() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    manifest = manifest_of(weights := weights_of(1))
    loader.begin(manifest)
    assert loader.destinations() is None
    loader(weights)
    loader.finish()
    loader.begin(manifest)
    places = loader.destinations()
    assert places is not None
    assert places.keys() == {"norm", "expert.0"}
    weights = weights_of(2)
    for name, tensor in weights:
        if name in places:
            places[name].copy_(tensor)
    loader([(name, places.get(name, tensor)) for name, tensor in weights])
    loader.finish()
    require_bits(served, weights)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["norm"], r"Nothing is sent for 'norm.weight' of the worker's model \(1 parameters in all\)"),
        (["k"], r"48 of the 72 elements of 'attn.qkv' of the worker's model are sent, and nothing for the others"),
        (["odd", "odd_scale"], r"Nothing is sent for 'odd.a', 'odd.scale' of the worker's model"),
    ],
)
def test_what_is_missing_is_told_before_the_first_byte(without: list[str], message: str) -> None:
    served = Served(0)
    with pytest.raises(ManifestMismatchError, match=message):
        PlannedLoader(served).begin(manifest_of(weights_of(1, without)))
    assert not served.log


def test_a_part_of_a_layer_may_come_if_it_is_written_directly_and_only_then() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    first = weights_of(1)
    some = [(name, tensor) for name, tensor in weights_of(2) if name in ("k", "norm")]
    with pytest.raises(ManifestMismatchError, match=r"24 of the 72 elements of 'attn.qkv'"):
        loader.begin(manifest_of(some, partial=True))
    send(loader, first)
    send(loader, some, manifest=manifest_of(some, partial=True))
    require_bits(served, list((dict(first) | dict(some)).items()))
    send(loader, whole := weights_of(3))
    require_bits(served, whole)


def test_a_failure_is_put_back_and_the_next_update_heals_it() -> None:
    served = Served(0, listed=())
    loader = PlannedLoader(served)
    send(loader, weights_of(1))
    served.fail_at = "norm"
    with pytest.raises(RuntimeError, match="norm cannot be processed"):
        send(loader, weights_of(2))
    loader.abort("it failed", True)
    assert served.log[-1] == "restore"
    loader.abort("it failed", True)
    assert served.log.count("restore") == 1
    served.fail_at = ""
    send(loader, weights := weights_of(3))
    require_bits(served, weights)


def test_nothing_is_restored_that_was_not_opened() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    loader.begin(manifest_of(weights_of(1)))
    loader.abort("refused", False)
    assert not served.log


def test_a_layer_that_processing_changes_later_is_no_longer_written_directly() -> None:
    served = Served(0, listed=("norm",))
    loader = PlannedLoader(served)
    manifest = manifest_of(weights_of(1))
    send(loader, weights_of(1), manifest=manifest)
    assert "norm" in loader.targets(manifest)
    served.listed = ()
    assert "norm" not in loader.targets(manifest)
    send(loader, weights := weights_of(2), manifest=manifest)
    require_bits(served, weights)


def test_a_layer_whose_serving_tensors_are_padded_is_not_written_directly() -> None:
    served = Served(0)
    served.serving["mlp.down"] = torch.zeros(6, 9)[:, :4]
    loader = PlannedLoader(served)
    for seed in (1, 2):
        send(loader, weights := weights_of(seed))
        require_bits(served, weights)
    assert "down" not in loader.targets(manifest_of(weights))
    assert "norm" in loader.targets(manifest_of(weights))


def test_a_complete_plan_is_not_compared_with_what_is_required_at_each_update() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    manifest = manifest_of(weights := weights_of(1))
    send(loader, weights, manifest=manifest)
    served.required = lambda: pytest.fail("asked again")  # type: ignore[method-assign]
    send(loader, weights, manifest=manifest)
    require_bits(served, weights)


def test_a_loader_is_run_once_for_all_weights_and_once_for_each_part_that_is_sent_in_turn() -> None:
    served = Served(0)
    loader = PlannedLoader(served)
    runs: list[int] = []
    own_loader = served.own_loader

    def counted(weights: Any) -> None:
        runs.append(len(weights))
        own_loader(weights)

    served.own_loader = counted  # type: ignore[method-assign]
    parts = [[(name, tensor) for name, tensor in weights_of(2) if name == part] for part in ("norm", "down")]
    manifests = [manifest_of(some, partial=True) for some in parts]
    send(loader, weights_of(1))
    loads = len(runs)
    for _ in range(3):
        for some, manifest in zip(parts, manifests, strict=True):
            send(loader, some, manifest=manifest)
    assert len(runs) == loads + 2
    send(loader, weights := weights_of(3))
    assert sum(runs[loads + 2 :]) == 2, "of all weights, those of the layer that is left to it"
    require_bits(served, weights)
