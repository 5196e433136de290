"""Which part of each weight lies where: trainer ranks hold rows, workers keep their share.

Nothing here asks the planner of the core: a benchmark that compares with it has to cut by itself.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import attrs
import torch

from weight_transfer.bench.architectures import ITEMSIZE
from weight_transfer.model.regions import Region

Shape = tuple[int, ...]
BY_COLUMNS = ("o_proj", "down_proj")
_AT_ONCE = {"cpu": 30_000, "cuda": 2**24}  # elements: of fewer than 2**15 torch makes no threads wait for each other


@attrs.frozen
class Piece:
    """What a worker takes of one weight from one trainer rank: indices into the rank's shard and into the target."""

    name: str
    rank: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]
    nbytes: int


@attrs.frozen(kw_only=True)
class Parts:
    """A model's weights, cut for a number of trainer ranks and of workers.

    Attributes:
        shapes: full shapes by name.
        trainers: ranks; rank r holds share r % shards of the rows of every weight, as with FSDP2 or HSDP.
        shards: into how many shares the trainer's model is cut; there are trainers / shards replicas of it.
        workers: worker w keeps share w % shares.
        shares: into how many shares the workers' model is cut; there are workers / shares replicas of it.
        beside: for each worker the trainer rank that has the same GPU; None if there is none.
    """

    shapes: Mapping[str, Shape]
    trainers: int
    shards: int
    workers: int
    shares: int
    beside: Sequence[int | None]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return ITEMSIZE * sum(Region.whole(shape).volume for shape in self.shapes.values())

    @property
    def all_alike(self) -> bool:
        """Whether nothing is cut: one trainer holds all, and each worker keeps all."""
        return self.trainers == self.shares == 1

    def held(self, name: str, rank: int) -> Region:
        """Return what a trainer rank holds of a weight."""
        return Region.split(self.shapes[name], 0, rank % self.shards, self.shards)

    def kept(self, name: str, worker: int) -> Region | None:
        """Return what a worker keeps of a weight: rows, columns where tensor parallelism reduces, or whole experts."""
        shape, share = self.shapes[name], worker % self.shares
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert is not None:
            return Region.whole(shape) if int(expert[1]) * self.shares // self._experts == share else None
        if len(shape) == 1 or name.endswith("mlp.gate.weight"):
            return Region.whole(shape)
        return Region.split(shape, int(any(part in name for part in BY_COLUMNS)), share, self.shares)

    def pieces(self, worker: int) -> Iterator[Piece]:
        """Yield what a worker takes: of replicas that of its own GPU, else from all of them evenly."""
        taken = [0] * self.trainers
        for name in self.shapes:
            kept = self.kept(name, worker)
            if kept is None:
                continue
            for shard in range(self.shards):
                held = self.held(name, shard)
                common = held.intersect(kept)
                if common is not None:
                    nbytes = common.volume * ITEMSIZE
                    rank = min(self._nearest(shard, worker), key=taken.__getitem__)
                    taken[rank] += nbytes
                    yield Piece(name, rank, within(common, held), within(common, kept), nbytes)

    def _nearest(self, shard: int, worker: int) -> Sequence[int]:
        """Return the ranks from which a worker may take a shard, beginning with another one for each worker."""
        ranks = range(shard, self.trainers, self.shards)
        beside = self.beside[worker]
        if beside is not None and beside in ranks:
            return [beside]
        first = worker % len(ranks)
        return [*ranks[first:], *ranks[:first]]

    def by_rank(self, worker: int) -> list[int]:
        """Return the bytes that a worker takes from each rank."""
        sizes = [0] * self.trainers
        for piece in self.pieces(worker):
            sizes[piece.rank] += piece.nbytes
        return sizes

    @property
    def largest_piece(self) -> int:
        """Bytes of the largest piece of any worker."""
        return max(piece.nbytes for worker in range(self.workers) for piece in self.pieces(worker))

    def fill(self, tensor: torch.Tensor, name: str, region: Region, seed: int) -> None:
        """Fill a tensor that holds a region with bits that tell weight, place and seed."""
        for rows, bits in self._bits(name, region, seed, tensor.device):
            tensor.view(torch.int16)[rows].copy_(bits)

    def wrong(self, tensor: torch.Tensor, name: str, region: Region, seed: int) -> torch.Tensor:
        """Count the elements that hold other bits; int64 ``[]``, on the tensor's device."""
        count = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for rows, bits in self._bits(name, region, seed, tensor.device):
            count += (tensor.view(torch.int16)[rows] != bits).sum()
        return count

    @cached_property
    def _experts(self) -> int:
        found = (re.search(r"\.experts\.(\d+)\.", name) for name in reversed(list(self.shapes)))
        return next(1 + int(expert[1]) for expert in found if expert is not None)

    def _bits(self, name: str, region: Region, seed: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the bits of some rows of a region at a time, int16."""
        shape, rows = self.shapes[name], max(1, _AT_ONCE[device.type] * region.shape[0] // max(region.volume, 1))
        salt = zlib.crc32(name.encode()) % 2**24 + seed * 7919
        for start in range(0, region.shape[0], rows):
            some = min(rows, region.shape[0] - start)
            index = torch.zeros((some, *region.shape[1:]), dtype=torch.int32, device=device)
            step = 1
            for dim in reversed(range(len(shape))):
                first = region.offset[dim] + (start if dim == 0 else 0)
                own = torch.arange(first, first + index.shape[dim], dtype=torch.int32, device=device)
                index += (own * step).view([-1 if other == dim else 1 for other in range(len(shape))])
                step *= shape[dim]
            index.mul_(-1640531527).bitwise_right_shift_(9).add_(salt)
            yield slice(start, start + some), index.to(torch.int16)


def within(region: Region, around: Region) -> tuple[slice, ...]:
    """Return what indexes a region in a tensor that holds another one around it."""
    offset = (own - start for own, start in zip(region.offset, around.offset, strict=True))
    return Region(offset, region.shape).slices
