"""Weights that are one memory on one side, and several on the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.loading import same, sent_by, snapshot
from weight_transfer import KernelFormatLoader, ManifestMismatchError


class Pair(nn.Module):
    """Two weights ``a`` and ``b`` of one shape, apart or tied in several ways."""

    def __init__(self, tied: str = "") -> None:
        super().__init__()
        first, second = ("b", "a") if tied == "object, b first" else ("a", "b")
        self.register_parameter(first, nn.Parameter(torch.randn(3, 3)))
        one = self.get_parameter(first)
        if tied.startswith("object"):
            self.register_parameter(second, one)
        elif tied == "storage":
            self.register_parameter(second, nn.Parameter(one.data))
        elif tied == "transposed":
            self.register_parameter(second, nn.Parameter(one.data.t()))
        elif tied == "slice":
            self.register_parameter(second, nn.Parameter(torch.cat([one.data, one.data])))
            one.data = self.get_parameter(second).data[:3]
        else:
            self.register_parameter(second, nn.Parameter(torch.randn(3, 3)))


@pytest.mark.parametrize("worker", ["", "object", "object, b first", "storage"])
@pytest.mark.parametrize("trainer", ["object", "object, b first", "storage"])
@pytest.mark.parametrize("in_place", [True, False])
def test_ties_may_be_made_otherwise_on_the_worker_or_not_at_all(trainer: str, worker: str, in_place: bool) -> None:
    for source in (Pair(trainer), Pair(trainer)):
        model = Pair(worker)
        manifest, weights = sent_by(source)
        assert len(weights) == 1
        loader = KernelFormatLoader(model)
        loader.begin(manifest)
        if in_place:
            for name, tensor in weights:
                loader.destinations()[name].data.copy_(tensor)
            weights = list(loader.destinations().items())
        loader(weights)
        loader.finish()
        assert torch.equal(model.a, source.a)
        assert torch.equal(model.b, source.a)


@pytest.mark.parametrize("worker", ["object", "object, b first", "storage"])
def test_what_is_tied_on_the_worker_alone_is_refused(worker: str) -> None:
    model, (manifest, _) = Pair(worker), sent_by(Pair())
    before = snapshot(model)
    with pytest.raises(
        ManifestMismatchError, match=r"'[ab]' and '[ab]' are one weight in the worker's model but not on"
    ):
        KernelFormatLoader(model).begin(manifest)
    assert same(snapshot(model), before)


def test_a_tie_that_was_cut_between_two_updates_is_noticed() -> None:
    model = Pair("storage")
    loader = KernelFormatLoader(model)
    loader.begin(sent_by(Pair("object"))[0])
    model.b.data = model.b.data.clone()
    manifest, weights = sent_by(Pair())
    loader.begin(manifest)
    loader(weights)
    assert torch.equal(model.b, dict(weights)["b"])
    model.b.data = model.a.data
    with pytest.raises(ManifestMismatchError, match="are one weight in the worker's model"):
        loader.begin(manifest)


@pytest.mark.parametrize("tied", ["transposed", "slice"])
def test_weights_that_share_some_of_their_memory_are_refused(tied: str) -> None:
    model = Pair(tied)
    with pytest.raises(ManifestMismatchError, match=r"Weight '[ab]' shares memory with '[ab]'"):
        KernelFormatLoader(model).begin(sent_by(model)[0])


def test_a_weight_whose_elements_are_one_is_refused() -> None:
    model = nn.Module()
    model.register_buffer("scale", torch.ones(1).expand(4))
    with pytest.raises(ManifestMismatchError, match="Weight 'scale' has several elements in one place"):
        KernelFormatLoader(model).begin(sent_by(model)[0])


def test_weights_that_share_memory_from_some_update_on_are_refused() -> None:
    """The parameters are the same objects as before, and the manifest is the same."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    manifest, _ = sent_by(model)
    loader = KernelFormatLoader(model)
    loader.begin(manifest)
    model.a.data = torch.zeros(1).expand(6)
    with pytest.raises(ManifestMismatchError, match="Weight 'a' has several elements in one place"):
        loader.begin(manifest)
    both = torch.zeros(8)
    model.a.data, model.b.data = both[:6], both[2:]
    for _ in range(2):
        with pytest.raises(ManifestMismatchError, match="Weight 'a' shares memory with 'b'"):
            loader.begin(manifest)
    model.b.data = torch.zeros(6)
    loader.begin(manifest)


def test_a_conjugate_view_is_refused() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    manifest, _ = sent_by(model)
    loader = KernelFormatLoader(model)
    loader.begin(manifest)
    model.phase.data = model.phase.data.conj()
    with pytest.raises(ManifestMismatchError, match="Weight 'phase' is a conjugate or negative view"):
        loader.begin(manifest)
