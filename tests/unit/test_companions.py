"""Shards that are views, and those of FSDP, are adopted with everything that refers to their storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from support.lone_rank import lone_rank
from weight_transfer.memory.companions import companions_of
from weight_transfer.memory.export import Export, Exporter
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _export(exporter: Exporter, tensors: dict[str, torch.Tensor]) -> Export:
    params = (ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items())
    return exporter.refresh(Manifest(params), tensors, lambda: companions_of(tensors.values()))


def test_a_view_is_adopted_with_its_base() -> None:
    base = torch.arange(48, dtype=torch.float32)
    tensors = {"view": base[8:32].view(4, 6)}
    assert _export(Exporter(adopt=True), tensors).segment_ids == (1,)
    base.add_(1)
    assert torch.equal(tensors["view"], torch.arange(9, 33, dtype=torch.float32).view(4, 6))


def test_a_view_that_somebody_else_looks_into_is_staged() -> None:
    base = torch.arange(48, dtype=torch.float32)
    kept = base[:4]
    assert _export(Exporter(adopt=True), {"view": base[8:32]}).segment_ids == (-1,)
    assert kept.numel() == 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with lone_rank() as mesh:
        yield mesh


@pytest.mark.parametrize("local", [lambda p: p._local_tensor, lambda p: p.to_local().detach()], ids=["own", "alias"])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_fsdp_has_sharded_is_adopted_and_trained_in_place(
    mesh: DeviceMesh, local: Callable[[nn.Parameter], torch.Tensor], steps: int
) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        step()
    exporter = Exporter(adopt=True)
    before = {name: local(parameter) for name, parameter in model.named_parameters()}
    export = _export(exporter, before)
    assert set(export.segment_ids) == {1}
    values = {name: tensor.clone() for name, tensor in before.items()}
    step()
    after = {name: local(parameter) for name, parameter in model.named_parameters()}
    again = _export(exporter, after)
    assert (again.segment_ids, again.offsets) == (export.segment_ids, export.offsets)
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert not torch.equal(values["0.weight"], after["0.weight"])
