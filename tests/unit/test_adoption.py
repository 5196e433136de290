"""Whose memory weights are, before and after they were adopted."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from weight_transfer import ConfigError, ModuleSource, WeightReceiver, WeightSender
from weight_transfer.memory.export import Export, Exporter
from weight_transfer.testing.forked import ForkedChild
from weight_transfer.testing.models import hashes, randomise


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter(adopt=True)
    yield exporter
    exporter.close()


def export(module: nn.Module, exporter: Exporter) -> Export:
    source = ModuleSource(module)
    return exporter.refresh(source.manifest(), source.resident())


class One(nn.Module):
    """One weight with the given tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor, requires_grad=False)


def _shared(_: Path) -> torch.Tensor:
    shared: torch.Tensor = torch.randn(20).share_memory_()
    return shared


def _mapped_checkpoint(folder: Path) -> torch.Tensor:
    torch.save(torch.randn(20), folder / "weights.pt")
    loaded: torch.Tensor = torch.load(folder / "weights.pt", mmap=True)
    return loaded


def _mapped_file(folder: Path) -> torch.Tensor:
    mapped: torch.Tensor = torch.from_file(str(folder / "weights"), shared=True, size=20)
    return mapped


def _numpy(_: Path) -> torch.Tensor:
    return torch.from_numpy(np.ones(20))


def _conjugate(_: Path) -> torch.Tensor:
    return torch.randn(20, dtype=torch.complex64).conj()


def _negative(_: Path) -> torch.Tensor:
    return torch.randn(20, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize("made", [_shared, _mapped_checkpoint, _mapped_file, _numpy, _conjugate, _negative])
def test_memory_that_others_may_know_and_values_that_are_not_bytes_are_left_alone(
    made: object, tmp_path: Path, exporter: Exporter
) -> None:
    module = One(made(tmp_path))
    address, values = module.weight.data_ptr(), module.weight.clone()
    assert export(module, exporter).segment_ids == (-1,)
    assert module.weight.data_ptr() == address
    assert torch.equal(module.weight, values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_stays_pinned(exporter: Exporter) -> None:
    module = One(torch.randn(20).pin_memory())
    assert export(module, exporter).segment_ids == (-1,)
    assert module.weight.is_pinned()


@pytest.mark.parametrize("made", [_conjugate, _negative])
def test_the_values_of_conjugate_and_negative_views_arrive(made: object, tmp_path: Path) -> None:
    module = One(made(tmp_path))
    target = One(torch.zeros_like(module.weight.resolve_conj().resolve_neg()))
    with WeightReceiver(LOOPBACK, target) as receiver, WeightSender(LOOPBACK, [receiver]) as sender:
        sender.send(module)
    assert torch.equal(target.weight, module.weight)


LOOPBACK = {"backend": "loopback", "timeout": 20, "verify": "wire"}


# Resizing.


def test_an_adopted_storage_is_resized_and_its_weight_adopted_anew(exporter: Exporter) -> None:
    module = nn.Linear(30, 20)
    first = export(module, exporter)
    storage = module.weight.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    assert storage.nbytes() == storage.size() == module.weight.untyped_storage().nbytes() == 0
    with pytest.raises(ConfigError, match=r"'weight' has 0 bytes of memory and needs 2400"):
        export(module, exporter)
    storage.resize_(nbytes)
    assert storage.data_ptr() == module.weight.data_ptr()
    assert isinstance(module.weight, nn.Parameter)
    bits = module.weight.data.normal_().clone()
    assert export(module, exporter).segment_ids != first.segment_ids
    assert -1 not in export(module, exporter).segment_ids
    assert torch.equal(module.weight, bits)
    module.weight.untyped_storage().resize_(0)  # again, now that it was adopted again
    module.weight.untyped_storage().resize_(nbytes)


def test_a_storage_that_is_made_larger_or_smaller_keeps_what_it_has(exporter: Exporter) -> None:
    module = nn.Linear(30, 20, bias=False)
    export(module, exporter)
    bits = module.weight.detach().clone()
    module.weight.untyped_storage().resize_(10_000)
    assert torch.equal(module.weight, bits)
    module.weight.data._typed_storage()._resize_(600)
    assert torch.equal(module.weight, bits)


def test_a_tensor_is_resized_to_nothing_and_back(exporter: Exporter) -> None:
    module = nn.Linear(30, 20, bias=False)
    export(module, exporter)
    data = module.weight.data
    data.resize_(0)
    data.resize_(20, 30)
    assert data.shape == (20, 30)
    assert export(module, exporter).segment_ids != (-1,)


def test_tensors_of_one_storage_are_resized_together(exporter: Exporter) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(6, 4)
            self.a, self.b = nn.Parameter(whole[:2]), nn.Parameter(whole[2:].t())

    module = Fused()
    export(module, exporter)
    bits = hashes(module)
    module.a.untyped_storage().resize_(6 * 4 * 4)
    assert module.a.untyped_storage().data_ptr() == module.b.untyped_storage().data_ptr()
    assert hashes(module) == bits


def test_a_storage_that_somebody_else_looks_at_is_not_resized(exporter: Exporter) -> None:
    module = nn.Linear(30, 20, bias=False)
    export(module, exporter)
    flat = module.weight.data.view(-1)
    with pytest.raises(RuntimeError, match="anything beside the model's own tensors"):
        module.weight.untyped_storage().resize_(0)
    del flat
    module.weight.untyped_storage().resize_(0)


def test_adopted_weights_are_copied_saved_and_shared_like_others(exporter: Exporter) -> None:
    module = nn.Linear(30, 20)
    export(module, exporter)
    bits = hashes(module)
    twin = copy.deepcopy(module)
    twin.weight.untyped_storage().resize_(0)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = nn.Linear(30, 20)
    loaded.load_state_dict(torch.load(file))
    assert hashes(loaded) == hashes(module) == bits
    module.share_memory()
    assert hashes(module) == bits
    assert export(module, exporter).segment_ids == (-1, -1)


# Forks.


@contextmanager
def forked(module: nn.Module) -> Iterator[ForkedChild]:
    child = ForkedChild(module)
    try:
        yield child
    finally:
        child.stop()


def test_a_fork_parts_the_weights_and_the_next_refresh_adopts_them_anew(exporter: Exporter) -> None:
    module = nn.Linear(300, 20)
    first = export(module, exporter)
    address = module.weight.data_ptr()
    with forked(module) as child:
        assert exporter.parted
        assert module.weight.data_ptr() == address
        then = hashes(module)
        child.ask("randomise", seed=1)
        assert hashes(module) == then
        randomise(module, 2)
        now, theirs = hashes(module), child.ask("hashes")
        second = export(module, exporter)
        assert second is not first
        assert -1 not in second.segment_ids
        assert not exporter.parted
        assert hashes(module) == now
        assert child.ask("hashes") == theirs


def test_what_refers_to_a_parted_storage_goes_on_with_it(exporter: Exporter) -> None:
    module = nn.Linear(30, 20, bias=False)
    export(module, exporter)
    flat = module.weight.data.view(-1)
    with forked(module):
        assert export(module, exporter).segment_ids == (-1,)
    flat.zero_()
    assert not module.weight.any()


def test_a_child_may_adopt_what_it_has_inherited(exporter: Exporter) -> None:
    module = nn.Linear(30, 20)
    export(module, exporter)
    with forked(module):
        later = Exporter(adopt=True)  # as a child would make
        assert -1 not in export(module, later).segment_ids
        later.close()


# Inference mode.


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("built_inside", [False, True])
def test_adoption_leaves_tensors_what_they_were(exporter: Exporter, inside: bool, built_inside: bool) -> None:
    with torch.inference_mode(built_inside):
        module = nn.Linear(30, 20)
    bits = hashes(module)
    with torch.inference_mode(inside):
        assert -1 not in export(module, exporter).segment_ids
    assert module.weight.is_inference() is built_inside
    assert module.weight.requires_grad
    assert hashes(module) == bits
