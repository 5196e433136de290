"""An engine of either side, without a session: it does the steps of an update by region when it is told to.

Weights are random bits that depend on a seed, so that every process knows what each region has to hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

import weight_transfer as wt
from weight_transfer.authoring import (
    Deadline,
    IncomingRegions,
    Layout,
    Manifest,
    OutgoingRegions,
    ParamMeta,
    Region,
    Regions,
    Taker,
    torch_dtype,
    unstructure,
)
from weight_transfer.plan.pieces import plan_pieces

if TYPE_CHECKING:
    from support.actors import Stage

Holdings = Mapping[str, Sequence[tuple[Sequence[int], Sequence[int]]]]
"""Offsets and shapes, by parameter."""


class Plan:
    """Who holds and who keeps what."""

    def __init__(
        self, params: Mapping[str, tuple[str, Sequence[int]]], held: Sequence[Holdings], kept: Sequence[Holdings]
    ) -> None:
        self.manifest = Manifest(tuple(ParamMeta(name, dtype, tuple(shape)) for name, (dtype, shape) in params.items()))
        self.held = [self._regions(own) for own in held]
        self.kept = [self._regions(own) for own in kept]
        self.layout = Layout.of(self.held)
        self.pieces = [plan_pieces(self.layout, own, worker) for worker, own in enumerate(self.kept)]

    def _regions(self, own: Holdings) -> Regions:
        return Regions.of(self.manifest, {name: [Region(*box) for box in boxes] for name, boxes in own.items()})

    def full(self, seed: int, masters: str | None) -> list[torch.Tensor]:
        """Return every parameter, whole; in the dtype ``masters`` if there is one."""
        found = []
        for index, param in enumerate(self.manifest.params):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            if masters is not None and torch_dtype(param.dtype).is_floating_point:
                found.append(torch.randn(param.shape, generator=generator, dtype=torch_dtype(masters)))
                continue
            dtype = torch_dtype(param.dtype)
            count = math.prod(param.shape) * dtype.itemsize
            high = 2 if dtype is torch.bool else 256
            bits = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
            found.append(bits.view(dtype).view(param.shape))
        return found


def _placed(shape: Sequence[int], dtype: torch.dtype, device: str, strided: bool) -> torch.Tensor:
    """Return a tensor; a strided one lies with its last two dimensions swapped, within a larger tensor."""
    if not strided or len(shape) < 2:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    *before, rows, columns = shape
    return torch.zeros((*before, columns, rows + 3), dtype=dtype, device=device)[..., :rows].transpose(-1, -2)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class Incoming(IncomingRegions):
    """Counts what has moved; told to hold, it waits before the next bytes are written."""

    def __init__(self, stage: Stage, plan: Plan, worker: int, device: str, strided: bool) -> None:
        self._stage = stage
        self.layout, self.pieces, self.regions = plan.layout, plan.pieces[worker], []
        self.targets = []
        for index, param in enumerate(plan.manifest.params):
            for region in plan.kept[worker].of_param(index) or ():
                self.regions.append((index, region))
                self.targets.append(_placed(region.shape, torch_dtype(param.dtype), device, strided))
        self.counted: dict[int, int] = {}
        self.writes = 0
        self.holds = False

    def write_in_place(self) -> None:
        self.writes += 1
        if self.holds:
            self.holds = False
            self._stage.say("held")
            self._stage.await_command("release")

    def moved(self, rank: int, nbytes: int) -> None:
        self.counted[rank] = self.counted.get(rank, 0) + nbytes


def main(stage: Stage, side: str, **spec: Any) -> None:
    """Be a trainer rank or a worker until the test is over."""
    torch.set_num_threads(1)
    with torch.no_grad():
        (_trainer if side == "trainer" else _worker)(stage, **spec)


def _trainer(
    stage: Stage,
    rank: int,
    config: dict[str, Any],
    params: dict[str, Any],
    held: list[Any],
    kept: list[Any],
    device: str = "cpu",
    masters: str | None = None,
    strided: bool = False,
) -> None:
    plan = Plan(params, held, kept)
    parallel = wt.ParallelConfig(rank=rank, world_size=len(held), device=device)
    engine = wt.load_backend(config["backend"]).create_trainer_engine(wt.load_config(config), parallel)
    slots = [
        wt.WorkerSlot(peer=f"worker {number}", rank_offset=1 + number, count=1, world_size=1 + len(kept))
        for number in range(len(kept))
    ]
    shards = plan.layout.shards(rank)
    tensors = []
    for index, region in shards:
        dtype = torch_dtype(plan.manifest.params[index].dtype)
        dtype = torch_dtype(masters) if masters is not None and dtype.is_floating_point else dtype
        tensors.append(_placed(region.shape, dtype, device, strided))
    takers = [
        Taker(peer=f"worker {number}", worker=number, pieces=pieces.of_rank(rank))
        for number, pieces in enumerate(plan.pieces)
    ]
    outgoing = OutgoingRegions(rank=rank, layout=plan.layout, tensors=tensors, takers=takers)

    def fill(seed: int) -> None:
        whole = plan.full(seed, masters)
        for (index, region), tensor in zip(shards, tensors, strict=True):
            tensor.copy_(whole[index][region.slices])

    def send(timeout: float) -> int:
        counted: list[int] = []
        engine.send_regions(outgoing, Deadline(timeout), counted.append)
        engine.release_source()
        return sum(counted)

    def move() -> None:
        nonlocal outgoing
        for tensor in tensors:
            tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        outgoing = attrs.evolve(outgoing, tensors=list(tensors))

    stage.say("ready")
    stage.serve(
        {
            "open": lambda: [unstructure(fields) for fields in engine.open_endpoint(slots, Deadline(20))],
            "open_rank": lambda first: unstructure(engine.open_rank(first, slots, Deadline(20))),
            "join": lambda timeout: engine.join_workers(Deadline(timeout)),
            "fill": fill,
            "move": move,
            "share": lambda: engine.share_regions(outgoing, Deadline(20)),
            "send": send,
            "memory": lambda: engine.extra_memory,
            "abort": engine.abort_update,
            "shutdown": engine.shutdown,
        }
    )


def _worker(
    stage: Stage,
    number: int,
    config: dict[str, Any],
    params: dict[str, Any],
    held: list[Any],
    kept: list[Any],
    device: str = "cpu",
    masters: str | None = None,
    strided: bool = False,
) -> None:
    plan = Plan(params, held, kept)
    engine = wt.load_backend(config["backend"]).create_worker_engine(
        wt.load_config(config), wt.ParallelConfig(device=device)
    )
    incoming = Incoming(stage, plan, number, device, strided)

    def init(timeout: float, first: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        common = {"rank_offset": 1 + number, "world_size": 1 + len(kept), "timeout": timeout}
        info = {**first, **common, "trainer_ranks": len(held), "ranks": ranks}
        engine.init_transfer_engine(engine.parse_init_info(info))

    def receive(timeout: float, shares: list[dict[str, Any]], holds: bool = False) -> list[int]:
        incoming.counted, incoming.holds = {}, holds
        info = engine.update_info_cls(manifest=plan.manifest, timeout=timeout, shares=tuple(shares))
        engine.receive_regions(info, incoming)
        return [incoming.counted.get(rank, 0) for rank in range(len(held))]

    def holds_seed(seed: int) -> bool:
        whole = plan.full(seed, masters)
        expected = [
            whole[index][region.slices].to(tensor.dtype)
            for (index, region), tensor in zip(incoming.regions, incoming.targets, strict=True)
        ]
        return all(torch.equal(_bits(one), _bits(other)) for one, other in zip(incoming.targets, expected, strict=True))

    def move() -> None:
        incoming.targets = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in incoming.targets]

    stage.say("ready")
    stage.serve(
        {
            "init": init,
            "receive": receive,
            "holds_seed": holds_seed,
            "move": move,
            "writes": lambda: incoming.writes,
            "planned": lambda: plan.pieces[number].by_rank(len(held)).tolist(),
            "memory": lambda: engine.extra_memory,
            "abort": engine.abort_update,
            "shutdown": engine.shutdown,
        }
    )
