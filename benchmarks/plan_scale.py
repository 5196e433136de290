"""Plans for published models and cluster sizes, without moving a byte.

    python benchmarks/plan_scale.py [--case PART] [--workers N] [--json FILE]

Everything is computed as trainer and workers would: each trainer rank's regions, the layout that rank 0 merges from
them and sends, and each worker's plan from what arrives. Weights are bf16 (published runs of these models send fp8,
half as many bytes). Trainer and workers are on different hosts of eight GPUs, so no replica is nearer than another.

Cases, "trainer -> workers":

* Qwen3-235B-A22B, 32 GPUs with TP4 PP2 EP8 -> 32 with attention whole on each (DP) and experts over 16 (EP16). In each
  of the two stages of 16 GPUs, attention is cut in 4 and has 4 replicas; experts are cut in 8 and have 2 replicas.
* Kimi-K2, 256 GPUs with PP8 EP32 (no TP: attention has 32 replicas in each stage, experts none) -> 128 with attention,
  the shared expert and the vocabulary whole on each (DP) and experts over 128 (EP128: three of each layer on each).
* Kimi-K2, FSDP over 256 GPUs: every parameter is cut in 256 along its first dimension -> the same 128.

Stages hold equal numbers of layers, the first ones one more if need be; the embedding is the first stage's, norm and
head are the last one's.

Columns:

* ``plan``: seconds for a worker's plan, the slowest one; ``merge``: rank 0's, of the layout.
* ``wire``: bytes of the layout as JSON; it travels once.
* ``pieces`` and ``GB/worker``: of the worker that has most.
* ``busiest``: bytes of the busiest trainer rank over the mean of all; ``least``: the lowest figure that any choice of
  replicas could have: stages, and experts without replicas, are as uneven as they are.
* ``RSS``: peak of a process that does nothing but one worker's part (torch, which it imports, included).
* ``predicted``: seconds at 50 GB/s for each GPU, in and out: of the busiest GPU of either side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import shapes

from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces

GPU_RATE = 50e9  # bytes per second
GPUS_PER_HOST = 8
PUBLISHED = (
    "prime-rl, GLM-5.2: 1.86 s",
    "vLLM, Kimi-K2: 7.53 s",
    "pplx, Kimi-K2: 1.3 s",
)

Shape = tuple[int, ...]
Rule = Callable[[str, Shape], Region | None]


@attrs.frozen
class Weight:
    """What a name says: the layer (None if it is in none) and the routed expert (None if it belongs to none)."""

    layer: int | None
    expert: int | None

    @classmethod
    def of(cls, name: str) -> Weight:
        layer, expert = re.search(r"\.layers\.(\d+)\.", name), re.search(r"\.experts\.(\d+)\.", name)
        return cls(layer and int(layer[1]), expert and int(expert[1]))


@attrs.frozen(kw_only=True)
class Megatron:
    """A trainer with pipeline, tensor and expert parallelism; ranks count tensor parallelism first, the pipeline last.

    Attributes:
        ranks: of the trainer.
        pipeline: stages.
        tensor: parts of everything but the routed experts.
        expert: groups of the routed experts, within a stage.
        layers: of the model.
        experts: of a layer.
    """

    ranks: int
    pipeline: int
    tensor: int
    expert: int
    layers: int
    experts: int

    def regions(self, model: Manifest) -> Iterator[Regions]:
        """Yield what each rank has, which lists nothing else."""
        weights = [Weight.of(param.name) for param in model.params]
        for rank in range(self.ranks):
            stage, within = divmod(rank, self.ranks // self.pipeline)
            held = {}
            for param, weight in zip(model.params, weights, strict=True):
                if self._stage(param.name, weight) == stage and (
                    weight.expert is None or weight.expert * self.expert // self.experts == within % self.expert
                ):
                    held[param] = [self._region(param, weight, within % self.tensor)]
            names = {param.name: regions for param, regions in held.items()}
            yield Regions.of(Manifest(held), names, place("trainer", rank))

    def _stage(self, name: str, weight: Weight) -> int:
        if weight.layer is None:
            return 0 if "embed" in name else self.pipeline - 1
        most, more = divmod(self.layers, self.pipeline)
        longer = more * (most + 1)
        return weight.layer // (most + 1) if weight.layer < longer else more + (weight.layer - longer) // most

    def _region(self, param: ParamMeta, weight: Weight, part: int) -> Region:
        cut = re.search(r"(embed_tokens|lm_head|[qkv]_proj|o_proj)\.weight$", param.name)
        if weight.expert is not None or not cut or self.tensor == 1:
            return Region.whole(param.shape)
        return Region.split(param.shape, 1 if cut[1] == "o_proj" else 0, part, self.tensor)


@attrs.frozen
class FullySharded:
    """A trainer whose ranks each have a part of every parameter, along the first dimension."""

    ranks: int

    def regions(self, model: Manifest) -> Iterator[Regions]:
        """Yield what each rank has."""
        for rank in range(self.ranks):
            different = {param.shape for param in model.params}
            parts = {shape: [Region.split(shape, 0, rank, self.ranks)] for shape in different}
            held = {param.name: parts[param.shape] for param in model.params}
            yield Regions.of(model, held, place("trainer", rank))


@attrs.frozen
class ExpertParallel:
    """Workers that keep everything but the routed experts whole, and of those a part: ``groups`` share them."""

    ranks: int
    groups: int
    experts: int

    def regions(self, model: Manifest) -> Iterator[Regions]:
        """Yield what each worker keeps."""
        experts = [Weight.of(param.name).expert for param in model.params]
        whole = {param.shape: [Region.whole(param.shape)] for param in model.params}
        for rank in range(self.ranks):
            group = rank % self.groups
            kept = {
                param.name: whole[param.shape]
                if expert is None or expert * self.groups // self.experts == group
                else []
                for param, expert in zip(model.params, experts, strict=True)
            }
            yield Regions.of(model, kept, place("worker", rank))


CASES: dict[str, tuple[Callable[[], dict[str, Shape]], Megatron | FullySharded, ExpertParallel]] = {
    "Qwen3-235B, 32 (TP4 PP2 EP8) -> 32 (DP, EP16)": (
        shapes.qwen3_235b,
        Megatron(ranks=32, pipeline=2, tensor=4, expert=8, layers=94, experts=128),
        ExpertParallel(32, 16, 128),
    ),
    "Kimi-K2, 256 (PP8 EP32) -> 128 (DP, EP128)": (
        shapes.kimi_k2,
        Megatron(ranks=256, pipeline=8, tensor=1, expert=32, layers=61, experts=384),
        ExpertParallel(128, 128, 384),
    ),
    "Kimi-K2, 256 (FSDP) -> 128 (DP, EP128)": (shapes.kimi_k2, FullySharded(256), ExpertParallel(128, 128, 384)),
}


def place(side: str, rank: int) -> tuple[str, str]:
    return f"{side}-{rank // GPUS_PER_HOST}", str(rank % GPUS_PER_HOST)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def told(what: str, items: Iterator[Any], count: int) -> Iterator[Any]:
    """Pass items on; say every ten seconds how many there were."""
    last = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            tell(f"  {what}: {number} of {count}")


class Choices:
    """Bytes of plans by the set of ranks from which they could have come, for layouts where no rank has two shards."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._numbers: dict[bytes, int] = {}
        self._group = np.zeros((len(layout.patterns), len(layout.places)), dtype=np.int64)
        for own, rows in zip(self._group, layout.patterns, strict=True):
            _, region = np.unique(rows[:, 1:], axis=0, return_inverse=True)
            for number in range(region.max() + 1):
                ranks = rows[region.reshape(-1) == number, 0]
                own[ranks] = self._numbers.setdefault(ranks.tobytes(), len(self._numbers))
        self._bytes = np.zeros(len(self._numbers))

    def add(self, pieces: Pieces) -> None:
        groups = self._group[self._layout.pattern_of[pieces.param], pieces.rank]
        self._bytes += np.bincount(groups, weights=pieces.sizes, minlength=len(self._bytes))

    def least(self, sweeps: int = 100) -> float:
        """Return the lowest load that the busiest rank could have, over the mean of all.

        Each set of ranks levels its bytes again and again, as far as the others' loads allow.
        """
        load = np.zeros(len(self._layout.places))
        groups = [np.frombuffer(key, np.int64) for key in self._numbers]
        shares = [np.zeros(len(ranks)) for ranks in groups]
        for _ in range(sweeps):
            for number, ranks in enumerate(groups):
                load[ranks] -= shares[number]
                shares[number] = levelled(load[ranks], self._bytes[number])
                load[ranks] += shares[number]
        return float(load.max() / load.mean())


def levelled(load: Any, amount: float) -> Any:
    """Return what to add to each load so that the lowest ones become equal, ``amount`` in all."""
    order = np.sort(load)
    levels = (order.cumsum() + amount) / np.arange(1, len(order) + 1)
    fits = np.flatnonzero(levels > order)
    return np.maximum(levels[fits[-1] if len(fits) else 0] - load, 0)


def alone(model: dict[str, Any], layout: str, kept: str, worker: int) -> tuple[float, float, int]:
    """Be a worker: return the seconds to read the layout and to plan, and the peak of memory in bytes."""
    manifest = Manifest.from_wire(model)
    kept_regions = Regions.from_wire(json.loads(kept), manifest)
    since = time.perf_counter()
    arrived = Layout.from_wire(json.loads(layout), manifest)
    read = time.perf_counter() - since
    since = time.perf_counter()
    plan_pieces(arrived, kept_regions, worker)
    planned = time.perf_counter() - since
    return read, planned, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def merged(name: str, model: Manifest, trainer: Megatron | FullySharded) -> tuple[Layout, str, float]:
    """Return the layout, as workers have it and as it travels, and the seconds that rank 0 takes to merge it."""
    ranks = list(told("regions of trainer ranks", trainer.regions(model), trainer.ranks))
    since = time.perf_counter()
    layout = Layout.of(ranks)
    seconds = time.perf_counter() - since
    if layout.manifest.nbytes != model.nbytes or layout.whole.params:
        raise SystemExit(f"{name}: the trainer's ranks do not have all weights")
    wire = json.dumps(layout.to_wire())
    return Layout.from_wire(json.loads(wire), layout.manifest), wire, seconds


def measure(name: str, workers: int | None) -> dict[str, Any]:
    make, trainer, inference = CASES[name]
    tell(name)
    model = Manifest(ParamMeta(param, "bfloat16", shape) for param, shape in make().items())
    layout, wire, merge = merged(name, model, trainer)
    count = min(workers or inference.ranks, inference.ranks)
    kept = told("workers", inference.regions(layout.manifest), count)
    return {
        "case": name,
        "params": len(model.params),
        "nbytes": model.nbytes,
        "trainer_ranks": trainer.ranks,
        "workers": inference.ranks,
        "workers_planned": count,
        "merge_s": merge,
        "wire_bytes": len(wire),
        **planned(name, layout, wire, itertools.islice(kept, count)),
    }


def planned(name: str, layout: Layout, wire: str, workers: Iterator[Regions]) -> dict[str, Any]:
    """Plan for all workers; and once more, in a process of its own, for the one with most pieces."""
    seconds, pieces, sizes, fullest = [], [0], [], (0, "")
    by_rank, choices = np.zeros(len(layout.places), dtype=np.int64), Choices(layout)
    for worker, kept in enumerate(workers):
        since = time.perf_counter()
        plan = plan_pieces(layout, kept, worker)
        seconds.append(time.perf_counter() - since)
        if plan.nbytes != kept.nbytes:
            raise SystemExit(f"{name}: worker {worker} keeps {kept.nbytes} bytes, its plan has {plan.nbytes}")
        if len(plan) > max(pieces):
            fullest = worker, json.dumps(kept.to_wire())
        pieces.append(len(plan))
        sizes.append(plan.nbytes)
        by_rank += plan.by_rank(len(by_rank))
        choices.add(plan)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read, alone_s, peak = pool.apply(alone, (layout.manifest.to_wire(), wire, fullest[1], fullest[0]))
    return {
        "plan_s": max(*seconds, alone_s),
        "read_layout_s": read,
        "pieces": max(pieces),
        "worker_bytes": max(sizes),
        "source_bytes": int(by_rank.max()),
        "busiest_over_mean": float(by_rank.max() / by_rank.mean()),
        "least_over_mean": choices.least(),
        "worker_peak_bytes": peak,
        "predicted_s": max(int(by_rank.max()), *sizes) / GPU_RATE,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="part of a case's name; default is all")
    parser.add_argument("--workers", type=int, help="plan only so many; source loads are then of those alone")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    rows = [measure(name, options.workers) for name in CASES if options.case in name]
    if not rows:
        raise SystemExit(f"no case is called {options.case!r}; there are: {'; '.join(CASES)}")
    head = ("plan", "merge", "wire", "pieces", "GB/worker", "busiest", "least", "RSS", "predicted")
    print(f"{'':50}" + "".join(f"{title:>11}" for title in head))
    for row in rows:
        cells = (
            f"{row['plan_s']:.2f} s",
            f"{row['merge_s']:.2f} s",
            f"{row['wire_bytes'] / 1e3:.0f} KB",
            f"{row['pieces']:,}",
            f"{row['worker_bytes'] / 1e9:.1f}",
            f"{row['busiest_over_mean']:.3f}",
            f"{row['least_over_mean']:.3f}",
            f"{row['worker_peak_bytes'] / 1e6:.0f} MB",
            f"{row['predicted_s']:.2f} s",
        )
        print(f"{row['case']:50}" + "".join(f"{cell:>11}" for cell in cells))
    print(f"published, on other hardware, measured: {'; '.join(PUBLISHED)}")
    if options.json:
        options.json.write_text(json.dumps({"published": PUBLISHED, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
