"""What may move into shared memory, and what must not."""

from __future__ import annotations

import os

import torch
from torch import nn

from weight_transfer import ModuleSource
from weight_transfer.memory.export import Export, Exporter
from weight_transfer.memory.shared_memory import PrivateView, SharedMemory


def _export(module: nn.Module, exporter: Exporter) -> tuple[ModuleSource, Export]:
    source = ModuleSource(module)
    manifest = source.manifest()
    return source, exporter.refresh(manifest, source.resident())


def _mapped(export: Export, exporter: Exporter) -> dict[int, torch.Tensor]:
    return {
        segment.id: PrivateView(os.dup(exporter.segment(segment.id).fd), segment.nbytes).data
        for segment in export.segments
    }


def test_an_adopted_parameter_stays_the_same_object_with_the_same_bits_and_its_updates_are_seen() -> None:
    module, exporter = nn.Linear(300, 200), Exporter(adopt=True)
    weight, bits = module.weight, module.weight.detach().clone()
    source, export = _export(module, exporter)
    assert module.weight is weight
    assert torch.equal(module.weight, bits)
    views = dict(export.views(source.manifest(), _mapped(export, exporter)))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.ones(1, 300)).sum().backward()
    optimiser.step()
    assert not torch.equal(module.weight, bits)
    assert torch.equal(views["weight"], module.weight)
    exporter.close()


def test_nothing_changes_while_nothing_moves() -> None:
    module, exporter = nn.Linear(3, 2), Exporter(adopt=True)
    source, first = _export(module, exporter)
    assert exporter.refresh(source.manifest(), source.resident()) is first
    exporter.close()


def test_a_reallocated_parameter_is_adopted_anew_and_its_old_segment_is_dropped() -> None:
    module, exporter = nn.Linear(30, 20, bias=False), Exporter(adopt=True)
    _, first = _export(module, exporter)
    module.weight.data = torch.ones(20, 30)
    source, second = _export(module, exporter)
    assert first.segments != second.segments
    assert len(second.segments) == 1
    views = dict(second.views(source.manifest(), _mapped(second, exporter)))
    assert torch.equal(views["weight"], torch.ones(20, 30))
    exporter.close()


def test_tensors_that_share_a_storage_move_together() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(6, 4)
            self.a, self.b = nn.Parameter(whole[:2]), nn.Parameter(whole[2:].t())

    module, exporter = Fused(), Exporter(adopt=True)
    bits = [module.a.detach().clone(), module.b.detach().clone()]
    source, export = _export(module, exporter)
    assert export.segment_ids == (1, 1)
    views = dict(export.views(source.manifest(), _mapped(export, exporter)))
    assert torch.equal(views["a"], bits[0])
    assert torch.equal(views["b"], bits[1])
    assert module.a.untyped_storage().data_ptr() == module.b.untyped_storage().data_ptr()
    exporter.close()


def test_a_storage_that_somebody_else_refers_to_is_left_alone() -> None:
    module, exporter = nn.Linear(30, 20, bias=False), Exporter(adopt=True)
    flat = module.weight.data.view(-1)
    source, export = _export(module, exporter)
    assert export.segment_ids == (-1,)
    assert [param.name for param in export.staged(source.manifest()).params] == ["weight"]
    flat.zero_()
    assert not module.weight.any()
    exporter.close()


def test_memory_that_torch_does_not_own_is_left_alone() -> None:
    module, exporter = nn.Linear(2, 2, bias=False), Exporter(adopt=True)
    buffer = bytearray(16)
    module.weight.data = torch.frombuffer(buffer, dtype=torch.float32).view(2, 2)
    assert _export(module, exporter)[1].segment_ids == (-1,)
    exporter.close()


def test_staging_everything_moves_nothing() -> None:
    module, exporter = nn.Linear(30, 20), Exporter(adopt=False)
    before = module.weight.data_ptr()
    assert _export(module, exporter)[1].segment_ids == (-1, -1)
    assert module.weight.data_ptr() == before


def test_the_parameters_outlive_the_exporter() -> None:
    module, exporter = nn.Linear(300, 200), Exporter(adopt=True)
    bits = module.weight.detach().clone()
    _export(module, exporter)
    exporter.close()
    assert torch.equal(module.weight, bits)
    module.weight.data.add_(1)
    assert torch.equal(module.weight, bits + 1)


def test_a_later_exporter_finds_what_an_earlier_one_adopted() -> None:
    module, exporter = nn.Linear(300, 200), Exporter(adopt=True)
    _export(module, exporter)
    exporter.close()
    address, bits = module.weight.data_ptr(), module.weight.detach().clone()
    later = Exporter(adopt=True)
    source, export = _export(module, later)
    assert export.segment_ids == (1, 1)
    assert module.weight.data_ptr() == address
    assert torch.equal(dict(export.views(source.manifest(), _mapped(export, later)))["weight"], bits)
    later.close()


def test_the_memory_and_its_descriptor_go_with_the_last_tensor_in_it() -> None:
    module, exporter = nn.Linear(300, 200), Exporter(adopt=True)
    before, fds = set(SharedMemory.segments()), set(os.listdir("/proc/self/fd"))
    _export(module, exporter)
    assert len(set(SharedMemory.segments()) - before) == 1
    exporter.close()
    del module
    assert set(SharedMemory.segments()) <= before
    assert set(os.listdir("/proc/self/fd")) <= fds
