"""Layouts for tests of regions: what ranks hold and workers keep, filled with bits that say where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_transfer.model.manifest import Manifest, ParamMeta, torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.plan.exchange import IncomingRegions
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces

MANIFEST = Manifest(
    [
        ParamMeta("rows", "bfloat16", (10, 24)),
        ParamMeta("columns", "bfloat16", (7, 32)),
        ParamMeta("wide", "float32", (64, 48)),
        ParamMeta("bytes", "uint8", (5, 11)),
        ParamMeta("cube", "float16", (4, 6, 10)),
        ParamMeta("vector", "float32", (9,)),
        ParamMeta("scalar", "float64", ()),
    ]
)
BY_COLUMNS = ("columns", "wide", "cube")
CAST = "rows"
"""Ranks hold this one as float32; its values are numbers, which survive that."""


def split(ranks: int, dim: int = 0) -> list[Regions]:
    """Return what each of ``ranks`` holds, cut along a dimension; a scalar is every rank's."""
    found = []
    for rank in range(ranks):
        own = {
            param.name: [Region.split(param.shape, min(dim, len(param.shape) - 1), rank, ranks)]
            if param.shape
            else [Region.whole(())]
            for param in MANIFEST.params
        }
        found.append(Regions.of(MANIFEST, own, ("host", str(rank))))
    return found


def kept(workers: int) -> list[Regions]:
    """Return what each worker keeps: some weights by columns, some by rows, the vector whole."""
    found = []
    for worker in range(workers):
        own = {}
        for param in MANIFEST.params:
            whole = len(param.shape) < 2
            dim = 1 if param.name in BY_COLUMNS else 0
            own[param.name] = [Region.whole(param.shape) if whole else Region.split(param.shape, dim, worker, workers)]
        found.append(Regions.of(MANIFEST, own, ("host", str(worker))))
    return found


def full(seed: int) -> list[torch.Tensor]:
    """Return all weights, of random bits."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for param in MANIFEST.params:
        if param.name == CAST:
            weights.append(torch.randn(param.shape, generator=generator).to(torch_dtype(param.dtype)))
            continue
        bits = torch.randint(0, 256, (max(param.nbytes, 1),), dtype=torch.uint8, generator=generator)
        weights.append(bits.view(torch_dtype(param.dtype)).view(param.shape))
    return weights


def shards(layout: Layout, rank: int) -> list[torch.Tensor]:
    """Return tensors for the shards of a rank: one is transposed, one a view of a larger storage, one a master."""
    tensors = []
    for number, (index, region) in enumerate(layout.shards(rank)):
        param = MANIFEST.params[index]
        dtype = torch.float32 if param.name == CAST else torch_dtype(param.dtype)
        if number == 1:
            tensors.append(torch.zeros(region.shape[::-1], dtype=dtype).t())
        elif number == 2:
            tensors.append(torch.zeros((region.shape[0], region.shape[1] + 8), dtype=dtype)[:, : region.shape[1]])
        else:
            tensors.append(torch.zeros(region.shape, dtype=dtype))
    return tensors


def fill(tensors: Sequence[torch.Tensor], layout: Layout, rank: int, weights: Sequence[torch.Tensor]) -> None:
    """Give the shards of a rank their parts of the weights."""
    for tensor, (index, region) in zip(tensors, layout.shards(rank), strict=True):
        tensor.copy_(weights[index][region.slices])


def targets(own: Regions) -> list[torch.Tensor]:
    """Return tensors for what a worker keeps; one is a view with strides of its own."""
    found = []
    for index, param in enumerate(MANIFEST.params):
        for region in own.of_param(index) or []:
            dtype = torch_dtype(param.dtype)
            if param.name == "wide":
                found.append(torch.zeros((region.shape[0], region.shape[1] * 2), dtype=dtype)[:, ::2])
            else:
                found.append(torch.zeros(region.shape, dtype=dtype))
    return found


def expected(own: Regions, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what the targets must hold."""
    return [
        weights[index][region.slices] for index in range(len(MANIFEST.params)) for region in own.of_param(index) or []
    ]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaNs included."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return bool(
        (one.contiguous().reshape(-1).view(torch.uint8) == other.contiguous().reshape(-1).view(torch.uint8)).all()
    )


class Incoming(IncomingRegions):
    """What a worker receives, and what was said of it."""

    def __init__(self, layout: Layout, own: Regions, worker: int, into: Sequence[torch.Tensor]) -> None:
        self.layout, self.targets = layout, into
        self.pieces: Pieces = plan_pieces(layout, own, worker)
        self.writes = 0
        self.bytes_by_rank: dict[int, int] = {}

    def write_in_place(self) -> None:
        self.writes += 1

    def moved(self, rank: int, nbytes: int) -> None:
        assert self.writes
        self.bytes_by_rank[rank] = self.bytes_by_rank.get(rank, 0) + nbytes
