"""The guard before the loader: many weights written in place are accepted at once, and as strictly as one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weight_transfer import Manifest, ManifestMismatchError, ParamMeta
from weight_transfer.model.info import WeightTransferUpdateInfo
from weight_transfer.model.loading import KernelFormatLoader, Weights
from weight_transfer.session.update import Update

COUNT = 40


class Opened:
    """An update of a model with many parameters that has begun."""

    def __init__(self) -> None:
        self.model = nn.ParameterDict({f"p{i:02}": nn.Parameter(torch.full((3,), float(i))) for i in range(COUNT)})
        params = [ParamMeta(name, "float32", (3,)) for name in self.model]
        info = WeightTransferUpdateInfo(manifest=Manifest(tuple(params)), timeout=30)
        loader = KernelFormatLoader(self.model)
        loader.begin(info.manifest)
        self.told: list[int] = []
        self.update = Update(30)
        self.update.loader = loader
        self.update.begin(info, lambda event: self.told.append(event.done), "test")

    @property
    def own(self) -> Weights:
        return [(name, self.model[name]) for name in self.model]


@pytest.mark.parametrize("cut", [COUNT, COUNT // 2, 3])
def test_weights_written_in_place_complete_the_update(cut: int) -> None:
    opened = Opened()
    opened.update(opened.own[:cut])
    opened.update(opened.own[cut:])
    opened.update.finish()
    assert opened.told[-1] == COUNT * 12
    assert opened.update.complete


def test_a_mixture_of_own_and_foreign_tensors_is_loaded() -> None:
    opened = Opened()
    weights = opened.own
    weights[7] = ("p07", torch.full((3,), -1.0))
    opened.update(weights)
    opened.update.finish()
    assert [opened.model[f"p{i:02}"][0].item() for i in (6, 7, 8)] == [6.0, -1.0, 8.0]


def _swapped(weights: Weights) -> Weights:
    weights[1], weights[2] = (weights[1][0], weights[2][1].detach()[:2]), weights[2]
    return weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: [*weights, weights[0]], "'p00' arrived twice"),
        (lambda weights: [*weights[:-1], ("q", weights[-1][1])], "'q' arrived twice or is not in the manifest"),
        (_swapped, r"p01: float32 \[3\] arrived as torch.float32 \[2\]"),
    ],
    ids=["twice", "unknown", "wrong shape"],
)
def test_what_does_not_fit_is_refused(spoil: Callable[[Weights], Weights], message: str) -> None:
    opened = Opened()
    with pytest.raises(ManifestMismatchError, match=message):
        opened.update(spoil(opened.own))


def test_what_is_missing_is_named() -> None:
    opened = Opened()
    opened.update(opened.own[:-1])
    with pytest.raises(ManifestMismatchError, match="1 of 40 parameters did not arrive, such as 'p39'"):
        opened.update.finish()


def test_nothing_at_all_is_no_error_until_the_end() -> None:
    opened = Opened()
    opened.update([])
    with pytest.raises(ManifestMismatchError, match="40 of 40"):
        opened.update.finish()
