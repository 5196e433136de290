"""Weights that lie on one or several trainer ranks, and their bits, which every process knows without asking.

The layouts are those of real trainers. Where a rank's shards lie is worked out by torch, or written down here; never by
what is tested.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from weight_transfer.model.bits import as_bits
from weight_transfer.model.manifest import torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.model.sharded_source import ShardedSource
from weight_transfer.model.source import ModuleSource, WeightSource
from weight_transfer.testing.models import Weight, raw_bytes, weight

EXPERTS = 5
WEIGHTS: list[Weight] = [
    weight("embed", "bfloat16", 7, 33),
    weight("q", "float32", 9, 20),
    weight("k", "float32", 5, 20),
    weight("v", "float32", 5, 20),
    weight("gate", "bfloat16", 6, 13),
    weight("up", "bfloat16", 6, 13),
    weight("down", "bfloat16", 13, 130),
    weight("large", "float32", 131, 65),
    weight("norm", "float32", 7),
    weight("short", "bfloat16", 2, 5),
    weight("scale", "float32"),
    weight("steps", "int32", 11, 3),
    weight("packed", "float8_e4m3fn", 10, 7),
    weight("experts", "bfloat16", 6, 5, 7),
    weight("expert_scales", "float8_e5m2", 3, 4, 3),
    weight("nothing", "float32", 0, 7),
    *(weight(f"expert{index}", "bfloat16", 3, 9) for index in range(EXPERTS)),
]
"""Odd and uneven sizes, fewer rows than ranks, one dimension and three, none, and no elements; 45 KiB."""

ALONE = weight("alone", "bfloat16", 5, 70)
"""A weight that workers can be told to declare no target for."""


def bits(seed: int, name: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the whole of a weight on the CPU: all patterns of bits, NaNs included, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    kind = torch_dtype(dtype)
    nbytes = torch.empty(shape, dtype=kind, device="meta").nbytes
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(kind).view(shape)


@attrs.frozen(eq=False)
class Place:
    """A region of a weight, and the tensor where its bits are or belong."""

    name: str
    region: Region
    tensor: torch.Tensor

    def write(self, whole: torch.Tensor) -> None:
        """Take its part of the whole weight."""
        with torch.no_grad():
            as_bits(self.tensor.detach()).copy_(as_bits(whole[self.region.slices]))

    def holds(self, whole: torch.Tensor) -> bool:
        """Whether it has its part of the whole weight, bit for bit."""
        return raw_bytes(self.tensor) == raw_bytes(whole[self.region.slices])


class Places:
    """The places of some weights.

    Args:
        weights: all that there are.
        places: in any order; several of one weight, or none.
    """

    def __init__(self, weights: Sequence[Weight], places: Sequence[Place]) -> None:
        self._weights = weights
        self._places = places

    def write(self, seed: int) -> None:
        """Give all of them the bits of a seed."""
        for place, whole in self._with_bits(seed):
            place.write(whole)

    def unlike(self, seed: int) -> list[str]:
        """Return the weights and regions that have other bits than those of a seed."""
        return [f"{place.name} {place.region}" for place, whole in self._with_bits(seed) if not place.holds(whole)]

    def _with_bits(self, seed: int) -> Iterator[tuple[Place, torch.Tensor]]:
        for name, dtype, shape, _ in self._weights:
            own = [place for place in self._places if place.name == name]
            whole = bits(seed, name, dtype, shape) if own else None
            for place in own:
                assert whole is not None
                yield place, whole


Holding = tuple[WeightSource, list[Place]]
"""What a rank gives to ``send``, and where its shards are."""


def plain(weights: Sequence[Weight], _rank: int, _size: int, device: str) -> Holding:
    """Hold everything in a module."""
    module = nn.Module()
    for name, dtype, shape, _ in weights:
        _put(module, name, torch.zeros(shape, dtype=torch.uint8, device=device).to(torch_dtype(dtype)))
    return ModuleSource(module), _whole(module)


def fsdp(weights: Sequence[Weight], rank: int, size: int, device: str) -> Holding:
    """Shard a module with FSDP2; what it leaves alone, each rank has."""
    return _wrapped(weights, rank, device, (size,), ("shard",))


def hsdp(weights: Sequence[Weight], rank: int, size: int, device: str) -> Holding:
    """Shard a module with FSDP2 over half of the ranks; the other half are replicas."""
    return _wrapped(weights, rank, device, (2, size // 2), ("replicate", "shard"))


def tp(weights: Sequence[Weight], _rank: int, size: int, device: str) -> Holding:
    """Cut every other matrix by columns, and the others by rows."""
    columns = itertools.cycle((True, False))
    return _cut(
        weights, device, (size,), lambda shape: [Shard(1 if len(shape) == 2 and next(columns) else 0)] if shape else []
    )


def grid(weights: Sequence[Weight], _rank: int, size: int, device: str) -> Holding:
    """Cut matrices by rows over two halves of the ranks, and by columns within each half."""

    def placements(shape: Sequence[int]) -> list[Any]:
        return [Shard(0) if shape else Replicate(), Shard(len(shape) - 1) if len(shape) > 1 else Replicate()]

    return _cut(weights, device, (2, size // 2), placements)


def megatron(weights: Sequence[Weight], rank: int, size: int, device: str) -> Holding:
    """List shards by hand: stages that only one rank has, whole experts, columns in Fortran's order, and replicas."""
    places = []
    for name, dtype, shape, _ in weights:
        regions = [Region.whole(shape)]
        if name in ("embed", "short"):
            regions = regions if rank == (0 if name == "embed" else size - 1) else []
        elif name.startswith("expert"):
            stacked = len(shape) == 3
            count = shape[0] if stacked else 1
            first = 0 if stacked else int(name.removeprefix("expert"))
            mine = [index for index in range(count) if (first + index) % size == rank]
            regions = [Region((index, 0, 0), (1, *shape[1:])) for index in mine] if stacked else regions[: len(mine)]
        elif len(shape) == 2:
            regions = [Region.split(shape, 1 if name in ("down", "v") else 0, rank, size)]
        for region in regions:
            tensor = torch.zeros(region.shape[::-1], dtype=torch.uint8, device=device).to(torch_dtype(dtype))
            turned = tensor.permute(tuple(reversed(range(tensor.ndim))))
            places.append(Place(name, region, turned if name in ("down", "packed") else turned.contiguous()))
    shapes = {name: shape for name, _, shape, _ in weights}
    rows = [(place.name, shapes[place.name], place.region.offset, place.tensor) for place in places]
    return ShardedSource(rows), places


LAYOUTS: dict[str, Callable[[Sequence[Weight], int, int, str], Holding]] = {
    "plain": plain,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp": tp,
    "grid": grid,
    "megatron": megatron,
}
"""By name: takes weights, the rank, the number of ranks, and a device."""


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.ndim:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


def _whole(module: nn.Module) -> list[Place]:
    return [Place(name, Region.whole(tensor.shape), tensor) for name, tensor in module.state_dict().items()]


def _wrapped(
    weights: Sequence[Weight], rank: int, device: str, shape: tuple[int, ...], names: tuple[str, ...]
) -> Holding:
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    source, _ = plain(weights, rank, 1, device)
    assert isinstance(source, ModuleSource)
    module = source.module
    fully_shard(module, mesh=mesh)
    return ModuleSource(module), _local(module)


def _cut(
    weights: Sequence[Weight], device: str, shape: tuple[int, ...], placements: Callable[[Sequence[int]], list[Any]]
) -> Holding:
    mesh = init_device_mesh(torch.device(device).type, shape)
    module = nn.Module()
    for name, dtype, full, _ in weights:
        tensor = torch.zeros(full, dtype=torch.uint8, device=device).to(torch_dtype(dtype))
        where = placements(full) or [Replicate()]
        cut = distribute_tensor(tensor, mesh, where, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=False))
    return ModuleSource(module), _local(module)


def _local(module: nn.Module) -> list[Place]:
    """Return where a rank's own parts of a module are, as torch says."""
    places = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            if 0 not in shape:
                places.append(Place(name, Region(offset, shape), tensor._local_tensor))  # noqa: SLF001
        else:
            places.append(Place(name, Region.whole(tensor.shape), tensor))
    return places
