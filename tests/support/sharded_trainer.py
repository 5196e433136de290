"""One rank of a trainer whose weights are sharded over meshes of several shapes; it sends nothing."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import weight_transfer as wt

if TYPE_CHECKING:
    from support.actors import Stage

Held = dict[str, list[list[list[int]]] | None]
"""Regions by name, offset and shape of each; None for a weight that is gathered."""


def main(stage: Stage, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        stage.say(rank)
        stage.serve({"place": place, "wrap": wrap, "stale": stale, "midway": midway})
    finally:
        dist.destroy_process_group()


def indices(shape: list[int] | torch.Size) -> torch.Tensor:
    """Return a tensor in which each element says where it is."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def placement(text: str) -> Placement:
    """Return what a text such as ``S0``, ``S1/2`` (in two strips), ``R`` or ``P`` stands for."""
    if text in ("R", "P"):
        return Replicate() if text == "R" else Partial()
    dim, _, strips = text[1:].partition("/")
    return _StridedShard(int(dim), split_factor=int(strips)) if strips else Shard(int(dim))


def mesh_of(ranks: list[Any], names: tuple[str, ...] | None = None) -> DeviceMesh:
    return DeviceMesh("cpu", ranks, mesh_dim_names=names)


def place(shape: list[int], mesh: list[Any], placements: list[str], order: list[int] | None = None) -> Held:
    """Cut one weight, and say what this rank holds; the ``order`` is that of the mesh dimensions, first cut first."""
    module = nn.Module()
    on = mesh_of(mesh)
    inside = on.get_coordinate() is not None
    if "P" in placements:
        weight = DTensor.from_local(indices(shape), on, list(map(placement, placements)))
    elif order is not None:
        weight = ordered(indices(shape), on, list(map(placement, placements)), order)
    else:
        weight = distribute_tensor(indices(shape), on, list(map(placement, placements)), src_data_rank=None)
    if order is None:
        module.weight = nn.Parameter(weight)
    else:
        module.register_buffer("weight", weight)  # as a parameter it would lose its order, to torch as well
    module.register_buffer("scale", indices([3]))
    return held(module, {"weight": indices(shape), "scale": indices([3])}, gathers=inside)


def ordered(full: torch.Tensor, mesh: DeviceMesh, placements: list[Any], order: list[int]) -> DTensor:
    """Cut one dimension in an order of one's own; torch has no public way yet."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta

    dim = placements[0].dim
    local = full
    for mesh_dim in order:
        chunks = local.chunk(mesh.size(mesh_dim), dim)
        index = mesh.get_local_rank(mesh_dim)
        local = chunks[index] if index < len(chunks) else local.narrow(dim, 0, 0)
    meta = TensorMeta(full.shape, full.stride(), full.dtype)
    spec = DTensorSpec(mesh, tuple(placements), meta, shard_order=(ShardOrderEntry(dim, tuple(order)),))
    return DTensor(local.contiguous(), spec, requires_grad=False)


def wrap(kind: str, sizes: list[int]) -> Held:
    """Shard two layers as trainers do, before and after a forward pass, and say what this rank holds."""
    first, second, third = sizes
    model = nn.Sequential(nn.Linear(first, second), nn.Linear(second, third, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(indices(parameter.shape))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if kind == "fsdp":
        mesh = mesh_of([0, 1, 2, 3])
        shard = partial(fully_shard, mesh=mesh)
    else:
        mesh = mesh_of([[0, 1], [2, 3]], ("outer", "inner"))
        if kind == "hsdp":
            shard = partial(fully_shard, mesh=mesh)
        else:
            parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            shard = partial(fully_shard, mesh=mesh["outer"])
    for layer in model:
        shard(layer)
    shard(model)
    before = held(model, expected)
    model(torch.ones(2, first)).sum()
    assert held(model, expected) == before
    return before


def held(module: nn.Module, expected: dict[str, torch.Tensor], gathers: bool = True) -> Held:
    """Return the regions of a module, after comparing every bit of them with what ought to be there."""
    source = wt.ModuleSource(module)
    source.manifest()
    shards = source.shards()
    assert source.manifest() is source.manifest()
    assert source.shards() is shards
    for name, own in shards.items():
        local = dict(module.state_dict(keep_vars=True))[name]
        memory = local._local_tensor if isinstance(local, DTensor) else local
        for shard in own:
            assert torch.equal(expected[name][shard.region.slices], shard.tensor), (name, str(shard.region))
            assert shard.tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
            assert shard.common is not isinstance(local, DTensor)
        assert sum(shard.region.volume for shard in own) == memory.numel() or not gathers
    if gathers:
        for name, tensor in source:
            if name in shards:
                assert torch.equal(tensor, expected[name]), name
    return {
        param.name: [[list(shard.region.offset), list(shard.region.shape)] for shard in shards[param.name]]
        if param.name in shards
        else None
        for param in source.manifest().params
    }


class Child(nn.Module):
    """A model inside of another one, which has been wrapped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(values) * self.scale
        return result


def midway() -> str:
    """Read a module while its forward pass is under way, and then after it."""
    model = Child()
    fully_shard(model, reshard_after_forward=False)
    source = wt.ModuleSource(model)
    refused = []

    def read(*_: Any) -> None:
        try:
            source.manifest()
        except wt.ConfigError as error:
            refused.append(str(error))

    handle = model.inner.register_forward_hook(read)
    model(torch.ones(2, 5))
    handle.remove()
    source.manifest()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return refused[0]


def stale(how: str) -> dict[str, int]:
    """Train with parameters that stay unsharded, and see that no copy of an earlier step is ever read.

    Returns:
        How often the module was looked at anew in three updates, the first apart.
    """
    torch.manual_seed(5)
    whole = Child()
    reshard = None if how == "root" else False
    if how != "child":
        for layer in whole.inner:
            fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(whole, reshard_after_forward=reshard)
    model = whole.inner if how == "child" else whole
    sharded = dict(whole.named_parameters())
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    source = wt.ModuleSource(model)
    looks = 0
    for round_ in range(4):
        whole(torch.ones(2, 5)).square().sum().backward()
        with torch.no_grad():
            whole(torch.ones(2, 5))  # an evaluation leaves everything unsharded
        if how == "unshard":
            for part in whole.modules():
                if hasattr(part, "unshard"):
                    part.unshard()
        assert not all(isinstance(parameter, DTensor) for parameter in whole.parameters())
        optimizer.step()
        optimizer.zero_grad()
        source.manifest()
        shards = source.shards()
        assert source.resident() == {}
        for name, tensor in source:
            parameter: Any = sharded[name if how != "child" else f"inner.{name}"]
            full = parameter.full_tensor()
            assert torch.equal(tensor, full), name
            for shard in shards[name]:
                assert shard.tensor is parameter._local_tensor
                assert torch.equal(shard.tensor, full[shard.region.slices]), name
        if not round_:
            looks = source._reader.looks
    return {"looks": source._reader.looks - looks}
