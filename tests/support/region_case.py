"""A model whose weights go by region: who holds and who keeps what of it, in what memory, and with which bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import attrs
import torch

from weight_transfer.model.manifest import Manifest, ParamMeta, torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.plan.exchange import IncomingRegions
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces

Params = Mapping[str, tuple[str, Sequence[int]]]
"""Dtype and shape, by name."""

Boxes = Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]]
"""Offsets and shapes of regions, by name."""

PARAMS: Params = {
    "embed": ("bfloat16", (301, 40)),
    "norm": ("float32", (40,)),
    "up": ("bfloat16", (7, 24, 64)),
    "scale": ("float32", ()),
    "down": ("float8_e4m3fn", (64, 129)),
    "phases": ("complex128", (9, 5)),
    "mask": ("bool", (33, 17)),
    "nothing": ("float32", (0, 4)),
}


def split(params: Params, count: int, dim: int = 0, dims: Mapping[str, int | None] | None = None) -> list[Boxes]:
    """Cut each parameter into ``count`` parts.

    Args:
        params: those.
        count: how many parts.
        dim: along which; those that have not as many dimensions are cut along their last one.
        dims: other dimensions, by name. Along None, a parameter stays whole for all, as scalars do.
    """

    def part(name: str, shape: Sequence[int], index: int) -> Region:
        along = (dims or {}).get(name, dim)
        if along is None or not shape:
            return Region.whole(shape)
        return Region.split(shape, min(along, len(shape) - 1), index, count)

    return [
        {
            name: [(region.offset, region.shape)]
            for name, (_, shape) in params.items()
            for region in [part(name, shape, index)]
        }
        for index in range(count)
    ]


def whole(params: Params, count: int) -> list[Boxes]:
    """Return all of each parameter, ``count`` times."""
    return split(params, count, dims=dict.fromkeys(params))


@attrs.frozen(kw_only=True, slots=False, eq=False)
class Case:
    """What is sent, and from where to where; JSON-safe.

    Attributes:
        params: all weights.
        held: by each trainer rank.
        kept: by each worker.
        masters: dtype in which ranks hold a weight of another one, by name.
        shards_lie: how ranks hold a weight, by name, if not contiguously; see `placed`.
        targets_lie: how workers keep one.
        lent: names of the weights to whose shards' storages something else refers, too.
    """

    params: Params
    held: Sequence[Boxes]
    kept: Sequence[Boxes]
    masters: Mapping[str, str] = attrs.field(factory=dict)
    shards_lie: Mapping[str, str] = attrs.field(factory=dict)
    targets_lie: Mapping[str, str] = attrs.field(factory=dict)
    lent: Sequence[str] = ()

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(ParamMeta(name, dtype, tuple(shape)) for name, (dtype, shape) in self.params.items())

    @cached_property
    def layout(self) -> Layout:
        return Layout.of([self._regions(boxes, rank) for rank, boxes in enumerate(self.held)])

    def pieces(self, worker: int) -> Pieces:
        return plan_pieces(self.layout, self._regions(self.kept[worker], worker), worker)

    def planned(self, worker: int) -> list[int]:
        """Return how many bytes a worker gets from each rank."""
        sizes: list[int] = self.pieces(worker).by_rank(len(self.held)).tolist()
        return sizes

    def targets(self, worker: int) -> list[torch.Tensor]:
        """Return tensors for what a worker keeps."""
        return [
            placed(region.shape, torch_dtype(param.dtype), self.targets_lie.get(param.name, ""))
            for param, region in self.targeted(worker)
        ]

    def targeted(self, worker: int) -> list[tuple[ParamMeta, Region]]:
        """Return what each target is, in order."""
        kept = self._regions(self.kept[worker], worker)
        return [
            (param, region) for index, param in enumerate(self.manifest.params) for region in kept.of_param(index) or ()
        ]

    def shards(self, rank: int) -> list[torch.Tensor]:
        """Return tensors for what a rank holds."""
        found = []
        for param, region in self.sharded(rank):
            dtype = torch_dtype(self.masters.get(param.name, param.dtype))
            found.append(placed(region.shape, dtype, self.shards_lie.get(param.name, "")))
        return found

    def sharded(self, rank: int) -> list[tuple[ParamMeta, Region]]:
        """Return what each shard is, in order."""
        return [(self.manifest.params[index], region) for index, region in self.layout.shards(rank)]

    def fill(self, shards: Sequence[torch.Tensor], rank: int, seed: int) -> None:
        """Give the shards of a rank the bits of a seed."""
        weights = self._weights(seed)
        for shard, (param, region) in zip(shards, self.sharded(rank), strict=True):
            shard.copy_(weights[param.name][region.slices])

    def unlike(self, targets: Sequence[torch.Tensor], worker: int, seed: int) -> list[str]:
        """Return which targets hold other bits than those of a seed."""
        weights = self._weights(seed)
        return [
            f"{param.name} {region}"
            for target, (param, region) in zip(targets, self.targeted(worker), strict=True)
            if not same_bits(target, weights[param.name][region.slices].to(target.dtype))
        ]

    def _weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Return all weights, whole, as ranks hold them: any bits, and numbers where they are cast."""
        found = {}
        for index, param in enumerate(self.manifest.params):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            master = self.masters.get(param.name)
            if master is not None:
                found[param.name] = torch.randn(param.shape, generator=generator, dtype=torch_dtype(master))
                continue
            dtype = torch_dtype(param.dtype)
            high = 2 if dtype is torch.bool else 256
            shape = (math.prod(param.shape) * dtype.itemsize,)
            bits = torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)
            found[param.name] = bits.view(dtype).view(param.shape)
        return found

    def _regions(self, boxes: Boxes, number: int) -> Regions:
        named = {name: [Region(*box) for box in own] for name, own in boxes.items()}
        return Regions.of(self.manifest, named, ("host", str(number)))


def mixed(ranks: int, workers: int, dim: int = 0) -> Case:
    """Return a case of `PARAMS`: some are cut otherwise on workers than on ranks, cast, or lie in strides."""
    return Case(
        params=PARAMS,
        held=split(PARAMS, ranks, dim),
        kept=split(PARAMS, workers, dims={"up": 1, "down": 1, "norm": None}),
        masters={"embed": "float32"},
        shards_lie={"up": "turned", "down": "amid"},
        targets_lie={"down": "spread"},
    )


def placed(shape: Sequence[int], dtype: torch.dtype, lies: str = "") -> torch.Tensor:
    """Return a tensor of zeros within a larger storage.

    Args:
        shape: its.
        dtype: its.
        lies: ``"turned"``, with its last two dimensions swapped, ``"amid"`` others along the last one, ``"spread"``,
            with others between any two, or contiguously, and then the storage is no larger.
    """
    if lies == "spread":
        return torch.zeros((*shape, 3), dtype=dtype)[..., 1]
    if lies == "turned" and len(shape) > 1:
        *before, rows, columns = shape
        return torch.zeros((*before, columns, rows + 3), dtype=dtype)[..., :rows].transpose(-1, -2)
    if lies == "amid" and shape:
        *before, columns = shape
        return torch.zeros((*before, columns + 8), dtype=dtype)[..., :columns]
    return torch.zeros(tuple(shape), dtype=dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaNs included."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return torch.equal(raw(one), raw(other))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return its bytes, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Incoming(IncomingRegions):
    """What a worker receives, and what was said of it.

    Args:
        case: of which it is a part.
        worker: its number.
        before_write: called when bytes are about to be written.
    """

    def __init__(self, case: Case, worker: int, before_write: Callable[[], object] = lambda: None) -> None:
        self.layout, self.pieces, self.targets = case.layout, case.pieces(worker), case.targets(worker)
        self._before_write = before_write
        self._may_write = False
        self.by_rank = [0] * len(case.held)

    def write_in_place(self) -> None:
        self._before_write()
        self._may_write = True

    def moved(self, rank: int, nbytes: int) -> None:
        assert self._may_write, "bytes have moved of which nothing was said before"
        self.by_rank[rank] += nbytes
