"""Loaders that do odd things, and what is published with them: what their own run would make, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from weight_transfer import Manifest, ManifestMismatchError, ParamMeta
from weight_transfer.model.planned import PlannedLoader

Load = Callable[[dict[str, Tensor], list[tuple[str, Tensor]]], None]


class Tiny:
    """A server whose layers are what stands before the dot; memory in load format holds sevens before it is loaded.

    Attributes:
        turned: layers that processing transposes.
        known: what `state` returns.
    """

    def __init__(self, load: Load, *, required: Collection[str] | None = None, turned: str = "", **shapes: Any) -> None:
        self.shapes = {name.replace("_", "."): shape for name, shape in shapes.items()}
        self.serving = {name: torch.full(shape, 5.0) for name, shape in self.shapes.items()}
        self.turned, self.known = turned, 0
        self._load, self._required = load, self.shapes if required is None else required
        self._loading: dict[str, Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[Any]:
        loading = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        yield (lambda weights: self._load(loading, weights)), loading

    def layer_of(self, name: str) -> str:
        return name.partition(".")[0]

    def required(self) -> Collection[str]:
        return self._required

    def optional(self) -> Collection[str]:
        return ()

    def split(self) -> tuple[int, int]:
        return 0, 1

    def state(self) -> object:
        return self.known

    def by_loader(self) -> Mapping[str, str]:
        return {}

    def in_place(self) -> Mapping[str, Tensor]:
        return self.serving

    def open(self, directly: Collection[str]) -> None:
        pass

    def begin_layer(self, layer: str) -> Mapping[str, Tensor]:
        begun = {name: torch.full(shape, 7.0) for name, shape in self.shapes.items() if self.layer_of(name) == layer}
        self._loading |= begun
        return begun

    def end_layer(self, layer: str) -> bool:
        for name in [name for name in self._loading if self.layer_of(name) == layer]:
            loaded = self._loading.pop(name)
            self.serving[name].copy_(loaded.t() if layer == self.turned else loaded)
        return layer != self.turned

    def load(self, weights: Any) -> None:
        for name, shape in self.shapes.items():
            self._loading.setdefault(name, torch.full(shape, 7.0))
        self._load(self._loading, weights)

    def finish(self) -> None:
        for layer in {self.layer_of(name) for name in self._loading}:
            self.end_layer(layer)

    def restore(self, reason: str) -> None:
        self._loading = {}


def send(loader: PlannedLoader, part: bool = False, **weights: Any) -> None:
    tensors = {name: torch.tensor(values) for name, values in weights.items()}
    loader.begin(
        Manifest([ParamMeta(name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items()], partial=part)
    )
    for weight in tensors.items():
        loader([weight])
    loader.finish()


def test_what_a_loader_fills_is_filled_in_layers_that_are_written_directly_too() -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        loading["a.bias"].zero_()
        for name, tensor in weights:
            (loading["a.weight"] if name == "w" else loading["a.bias"]).copy_(tensor)

    served = Tiny(load, a_weight=(2,), a_bias=(2,))
    loader = PlannedLoader(served)
    send(loader, w=[1.0, 2.0])
    assert served.serving["a.bias"].tolist() == [0.0, 0.0]
    served.serving["a.bias"].fill_(9.0)  # the server has thrown its memory away meanwhile
    send(loader, w=[3.0, 4.0])
    assert {name: tensor.tolist() for name, tensor in served.serving.items()} == {
        "a.weight": [3.0, 4.0],
        "a.bias": [0.0, 0.0],
    }


def test_a_part_that_has_nothing_of_a_layer_leaves_its_fills_alone() -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        loading["b.pad"].zero_()
        for name, tensor in weights:
            loading[f"{name}.weight"].copy_(tensor)

    served = Tiny(load, a_weight=(2,), b_weight=(2,), b_pad=(1,))
    loader = PlannedLoader(served)
    send(loader, a=[1.0, 2.0], b=[3.0, 4.0])
    served.serving["b.pad"].fill_(9.0)
    send(loader, part=True, a=[5.0, 6.0])
    assert served.serving["b.pad"].item() == 9.0
    send(loader, part=True, b=[7.0, 8.0])
    assert served.serving["b.pad"].item() == 0.0


def test_a_target_that_is_made_of_no_weight_leaves_all_to_the_loader() -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        loading["b.scale"].copy_(torch.ones(2))
        for name, tensor in weights:
            loading[f"{name}.weight"].copy_(tensor)

    served = Tiny(load, a_weight=(2,), b_scale=(2,))
    loader = PlannedLoader(served)
    for weight in ([1.0, 2.0], [3.0, 4.0]):
        send(loader, a=weight)
        assert served.serving["a.weight"].tolist() == weight
        assert served.serving["b.scale"].tolist() == [1.0, 1.0]
    assert loader.warnings[0].startswith("2 layers are loaded by the model's own loader")


def test_a_weight_that_the_loader_looks_into_leaves_all_to_the_loader() -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        for name, tensor in weights:
            if name == "w":
                loading["a.weight"].copy_(tensor)
            elif tensor.sum() > 0:
                loading["a.weight"][0] = tensor

    served = Tiny(load, turned="a", a_weight=(2, 2))
    loader = PlannedLoader(served)
    for number in (1.0, 2.0):
        send(loader, w=[[number, 2.0], [3.0, 4.0]], fix=[8.0, 9.0])
        assert served.serving["a.weight"].tolist() == [[8.0, 3.0], [9.0, 4.0]]
    assert not loader.targets(Manifest([ParamMeta("w", "float32", (2, 2)), ParamMeta("fix", "float32", (2,))]))


@pytest.mark.parametrize("part", [False, True])
def test_a_layer_is_not_processed_with_memory_that_nothing_was_loaded_into(part: bool) -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        for name, tensor in weights:
            loading[f"a.{name}"].copy_(tensor)

    served = Tiny(load, required=(), turned="a", a_weight=(2, 2), a_scale=(1, 1))
    loader = PlannedLoader(served)
    with pytest.raises(ManifestMismatchError, match=r"Nothing is sent for 'a\.scale'"):
        send(loader, part=part, weight=[[1.0, 2.0], [3.0, 4.0]])
    assert served.serving["a.weight"].tolist() == [[5.0, 5.0], [5.0, 5.0]]


def test_a_layer_of_the_own_loader_must_come_whole_too() -> None:
    def load(loading: dict[str, Tensor], weights: Any) -> None:
        for name, tensor in weights:
            loading[f"a.{name}"].copy_(tensor if name == "scale" else tensor * 2)

    loader = PlannedLoader(Tiny(load, a_weight=(2,), a_scale=(1,)))
    with pytest.raises(ManifestMismatchError, match=r"Nothing is sent for 'a\.scale'"):
        send(loader, weight=[1.0, 2.0])


def test_a_loader_whose_state_has_changed_is_recorded_anew() -> None:
    here = [0]

    def load(loading: dict[str, Tensor], weights: Any) -> None:
        for name, tensor in weights:
            if name == f"expert{here[0]}":
                loading["a.weight"].copy_(tensor)

    served = Tiny(load, a_weight=(1,))
    loader = PlannedLoader(served)
    for expert, found in ((0, 1.0), (1, 2.0), (0, 1.0)):
        here[0] = served.known = expert
        send(loader, expert0=[1.0], expert1=[2.0])
        assert served.serving["a.weight"].item() == found
