"""Weights far down a model that change between updates: whatever loads them, and whichever of them are sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weight_transfer as wt

pytestmark = pytest.mark.timeout(60)

LAYERS = 40
LAST = f"layers.{LAYERS - 1}.weight"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(LAYERS))
        self.requires_grad_(False)

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def replaced(model: Model) -> torch.Tensor:
    old: torch.Tensor = model.get_parameter(LAST)
    model.layers[-1].weight = nn.Parameter(torch.zeros_like(old), requires_grad=False)
    return old


def moved(model: Model) -> torch.Tensor:
    old = model.get_parameter(LAST).data
    model.get_parameter(LAST).data = torch.zeros_like(old)
    return old


class Wrapped:
    """A user's own loader around ours, which knows of no stages and leaves the end out."""

    def __init__(self, model: nn.Module) -> None:
        self._own = wt.KernelFormatLoader(model)

    def begin(self, manifest: wt.Manifest) -> None:
        self._own.begin(manifest)

    def destinations(self) -> Any:
        return self._own.destinations()

    def __call__(self, weights: Any) -> None:
        self._own(weights)


def declared(model: Model) -> dict[str, Any]:
    first = wt.Target(wt.Region.whole((4, 4)), model.layers[0].weight)
    return {"needs": lambda manifest: {"layers.0.weight": first} if "layers.0.weight" in manifest.by_name else {}}


LOADERS: dict[str, Callable[[Model], dict[str, Any]]] = {
    "by name": lambda model: {},
    "ours": lambda model: {"load_weights": wt.KernelFormatLoader(model)},
    "wrapped": lambda model: {"load_weights": Wrapped(model)},
    "processed": lambda model: {"process_weights_after_loading": lambda module: None},
    "declared": declared,
}


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.session.outgoing.MANY", 0)
    for name, value in (("_FIRST", 2), ("_MOST", 4), ("_CARE", 1)):
        monkeypatch.setattr(f"weight_transfer.model.looking.{name}", value)


@pytest.mark.parametrize("backend", ["ipc", "nccl", "rdma"])
@pytest.mark.parametrize("side", ["trainer", "worker"])
@pytest.mark.parametrize("change", [replaced, moved])
@pytest.mark.parametrize("loads", LOADERS)
def test_the_new_weight_is_sent_and_the_old_one_left_alone(
    loads: str, change: Callable[[Model], torch.Tensor], side: str, backend: str
) -> None:
    """All of A, then B, then a part of C, with a change before each."""
    trained, served = Model(), Model()
    config = {"backend": backend, "timeout": 30, "bucket_bytes": 4096, "verify": "none"}
    with (
        wt.WeightReceiver(config, served, **LOADERS[loads](served)) as receiver,
        wt.WeightSender(config, [receiver]) as sender,
    ):
        seed = 0
        for only in (None, None, ["layers.3*"]):
            for _ in range(4):
                seed += 1
                trained.randomise(seed)
                sender.send(trained, only=only)
            old = change(trained if side == "trainer" else served)
            held = old.clone()
            trained.randomise(seed := seed + 1)
            sender.send(trained, only=only)
            chosen = [name for name in trained.state_dict() if only is None or name.startswith("layers.3")]
            assert LAST in chosen
            mine, theirs = trained.state_dict(), served.state_dict()
            assert [name for name in chosen if not torch.equal(mine[name], theirs[name])] == []
            assert torch.equal(old, held)
