"""Speed of updates by region, beside gathering, plain copies, and the limit, in the same run.

    python benchmarks/shards.py --device cuda|cpu --backend ipc|nccl|rdma [--trainers 2] [--workers 2]
        [--placement colocated|apart] [--mesh fsdp|hsdp] [--replicas 1] [--case dense|moe] [--layers N]
        [--repeat 9] [--skip-gathering] [--verify none|wire|loaded] [--json FILE] [--quick]

Trainer ranks and workers are processes. The trainer's weights are sharded by FSDP2, which cuts every weight along its
first dimension; with ``hsdp`` there are two replicas of the trainer's model, each cut into half as many shards. The
workers' model is cut by tensor parallelism, experts go whole to one worker; of ``--replicas`` each keeps all weights.

*Colocated*, trainer rank i and worker i share GPU i; *apart*, the trainer's ranks have the first GPUs and the workers
those behind. ``nccl`` on GPUs needs one for each process and is run apart whatever is asked for; the output says so. On
CPUs, placements do not differ. Shapes are Llama-3.1-8B's and those of 24 layers of Qwen3-30B-A3B; on CPUs
Qwen2.5-0.5B's, and a small mixture of experts; ``--layers`` cuts them.

Rows:

* ``limit``: the same bytes without anything around them, each worker's from the ranks it takes them from. Of replicas,
  a worker takes that of its own GPU, else an even part of each. All workers at once; the slowest counts. So it is bound
  by the slowest side: colocated by what a worker reads from peers over its link, or by the copies within its GPU,
  whichever takes longer; apart by what a worker reads or a trainer rank gives over its link, whichever is more.
  ``ipc`` on GPUs: local copies and reads of the peers, side by side; on CPUs: one contiguous copy by each worker,
  with one thread or one for each core, whichever is faster.
  ``nccl``: grouped sends and receives. ``rdma``: one NIXL read of each rank, one descriptor each.
* ``plain copies``: one ``copy_`` for each piece, strided as it is, from mapped shards (on CPUs from shards that the
  worker's process holds itself) into the worker's weights; all workers at once, the slowest counts.
* ``engine``: the slowest worker's ``receive_regions``: the method is wrapped in the worker's process by a timer that
  also waits for the GPU.
* ``update``: that phase of the report; ``send``: wall time of ``WeightSender.send`` on rank 0, all its phases, with the
  control calls over HTTP.
* ``gathered``: the same ``send`` of a source that does not say where its shards lie: all ranks gather every weight in
  lockstep, rank 0 sends all to all workers, and each takes its part. ``gathered, engine``: ``receive_weights`` in that.

All but the last two take turns, in another order in each round, so that a noisy machine disturbs them alike; medians
are compared. Rates are bytes kept by a worker per second. Before, whatever moves weights brings version A, then B, then
A again to weights that were zero, and every element of every worker is compared. ``send`` must have moved as many bytes
as each worker keeps, from the ranks that hold them. On CPUs each process computes with one thread, and CPU seconds of
the thread stand beside wall time: where other programs take the cores, they are the ones to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from rows import show_memory
from shards_run import Run, summary

from weight_transfer.bench.member import Scene
from weight_transfer.bench.parts import Parts
from weight_transfer.errors import WeightTransferError

CASES = {
    ("cuda", "dense"): shapes.llama_8b,
    ("cuda", "moe"): shapes.qwen_moe,
    ("cpu", "dense"): shapes.qwen_half_billion,
    ("cpu", "moe"): shapes.small_moe,
}
QUICK = {"dense": shapes.toy, "moe": shapes.toy_moe}


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("ipc", "nccl", "rdma"), default="ipc")
    parser.add_argument("--trainers", type=int, default=2, help="trainer ranks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--placement", choices=("colocated", "apart"), default="colocated")
    parser.add_argument("--mesh", choices=("fsdp", "hsdp"), default="fsdp")
    parser.add_argument("--replicas", type=int, default=1, help="of the workers' model")
    parser.add_argument("--case", choices=("dense", "moe"), default="dense")
    parser.add_argument("--layers", type=int, help="of the model, all by default")
    parser.add_argument("--repeat", type=int, default=9, help="rounds, after one that does not count")
    parser.add_argument("--skip-gathering", action="store_true")
    parser.add_argument("--verify", choices=("none", "wire", "loaded"), default="none")
    parser.add_argument("--quick", action="store_true", help="tiny weights and two rounds")
    parser.add_argument("--step", type=float, default=120, help="seconds that any one step may take")
    parser.add_argument("--life", type=float, default=600, help="seconds that the run may take")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    if options.mesh == "hsdp" and options.trainers % 2:
        parser.error(f"hsdp has two replicas, so --trainers must be even; it is {options.trainers}")
    if options.workers % options.replicas:
        parser.error(f"{options.workers} workers do not make {options.replicas} replicas")
    if options.trainers == 1 and options.workers == options.replicas:
        parser.error("with one trainer and whole replicas nothing is cut; `weight-transfer bench` measures that")
    if options.quick:
        options.repeat = min(options.repeat, 2)
    return options


def devices(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Return the devices of trainer ranks and workers, and what the reader must know of them."""
    trainers, workers = options.trainers, options.workers
    if options.device == "cpu":
        return ["cpu"] * trainers, ["cpu"] * workers, []
    notes = []
    if options.backend == "nccl" and options.placement == "colocated":
        options.placement = "apart"
        notes = ["nccl needs a GPU for each process and cannot be colocated, so trainer ranks and workers are apart"]
    first = trainers if options.placement == "apart" else 0  # of the workers' GPUs
    needed, gpus = max(trainers, first + workers), torch.cuda.device_count()
    if needed > gpus:
        raise SystemExit(
            f"{trainers} trainer ranks and {workers} workers, {options.placement}, need {needed} GPUs, and there are "
            f"{gpus}; choose fewer with --trainers and --workers"
        )
    every = [f"cuda:{number}" for number in range(needed)]
    return every[:trainers], every[first : first + workers], notes


def cut(options: argparse.Namespace, trainers: Sequence[str], workers: Sequence[str]) -> Parts:
    """Return what lies where."""
    named = QUICK[options.case]() if options.quick else CASES[options.device, options.case]()
    on_gpus = {device: rank for rank, device in enumerate(trainers) if device != "cpu"}
    return Parts(
        shapes=shapes.first_layers(named, options.layers),
        trainers=len(trainers),
        shards=len(trainers) // (2 if options.mesh == "hsdp" else 1),
        workers=len(workers),
        shares=len(workers) // options.replicas,
        beside=[on_gpus.get(device) for device in workers],
    )


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(found["title"])
    for note in found["notes"]:
        print(f"  {note}")
    kept, given = (" + ".join(f"{nbytes / 1e9:.3f}" for nbytes in found[name]) for name in ("kept", "given"))
    print(f"  bits equal after A, B, A: {', '.join(found['bits_equal'])}")
    gathered = found["gathered_bytes"]
    print(f"  kept by the workers {kept} GB, as much moved; given by the ranks {given} GB; gathered {gathered} bytes")
    for name, memory in found["memory"].items():
        show_memory(memory, f", {name}")
    phases = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in found["phases_s"].items())
    print(f"  phases of send, ms: {phases}; over {', '.join(found['transports'])}")
    for warning in found["warnings"]:
        print(f"  warning: {warning}")
    print(f"  {'':18}{'median':>12}{'best':>12}{'GB/s':>8}{'of limit':>10}{'of copies':>10}{'CPU':>12}")
    for name, row in found["rows"].items():
        cpu = f"{row['cpu_s'] * 1e3:9.2f} ms" if row["cpu_s"] is not None and found["device"] == "cpu" else ""
        print(
            f"  {name:18}{row['median_s'] * 1e3:9.2f} ms{row['best_s'] * 1e3:9.2f} ms{row['GBps']:8.1f}"
            f"{row['of_limit']:10.3f}{row['of_copies']:10.3f}{cpu:>12}",
            flush=True,
        )


def described(options: argparse.Namespace, parts: Parts) -> str:
    """Return how the weights are laid out on both sides, in words."""
    copies = parts.trainers // parts.shards
    trainer = f"{copies} x {parts.shards}" if options.mesh == "hsdp" else str(parts.trainers)
    worker = f"{options.replicas} x {parts.shares}" if options.replicas > 1 else str(parts.shares)
    where = "" if options.device == "cpu" else f", {options.placement}"
    cut = "EP" if options.case == "moe" else "TP"
    return f"{options.mesh.upper()} {trainer} -> {cut} {worker}{where}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_of(arguments)
    trainers, workers, notes = devices(options)
    parts = cut(options, trainers, workers)
    config = {"backend": options.backend, "timeout": options.step, "init_timeout": options.step}
    config |= {"verify": options.verify}
    began, load = time.monotonic(), os.getloadavg()[0]
    scene = Scene(parts=parts, config=config, trainers=trainers, workers=workers)
    try:
        with Run(scene, options.step, options.life, options.repeat, not options.skip_gathering) as run:
            run.measure()
    except (AssertionError, WeightTransferError) as error:  # a process has died or is late, or something failed in it
        raise SystemExit(f"the benchmark has failed: {error}") from error
    machine = torch.cuda.get_device_name(0) if options.device == "cuda" else f"{os.cpu_count()} cores, load {load:.1f}"
    layout = described(options, parts)
    found = {
        "title": (
            f"{options.case}, {options.backend}, {layout}: {len(parts.shapes)} tensors, {parts.nbytes / 1e9:.2f} GB; "
            f"{machine}, torch {torch.__version__}; medians of {options.repeat} rounds"
        ),
        "layout": layout,
        "device": options.device,
        "machine": machine,
        "torch": torch.__version__,
        "backend": options.backend,
        "case": options.case,
        "verify": options.verify,
        "quick": options.quick,
        "devices": {"trainers": trainers, "workers": workers},
        "notes": notes,
        "tensors": len(parts.shapes),
        "nbytes": parts.nbytes,
        "repeat": options.repeat,
        "wall_s": round(time.monotonic() - began, 1),
        **summary(run),
    }
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
