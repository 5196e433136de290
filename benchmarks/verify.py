"""Cost of ``verify``: the same weights sent without it, with ``wire`` and with ``loaded``, in the same run.

    python benchmarks/verify.py [--backend ipc nccl rdma] [--device cuda] [--peer] [--json FILE]
        [--layers 8 | --tensors 9000 --bytes 2048] [--workers 2]

These are cases of ``weight-transfer bench`` with three senders: trainer and workers are a process each and talk over
HTTP; the workers copy by name. The three, and the limit, take turns; medians of whole sends are compared, and the best
ones, which a busy machine disturbs least. Before, all bits of the workers are compared after A, then B, then A again,
for each of the three. With ``--peer`` the workers are on another GPU, which ``nccl`` on CUDA always needs. Shapes are
Llama-3.1-8B's with ``--layers`` layers, or all 32; on the CPU half as wide, with a quarter of the vocabulary, 1 GB.
With ``--tensors`` they are that many small ones instead, of ``--bytes`` each.

On the CPU the limit of ``wire`` is measured beside it: the same bytes copied by all threads, copied with digests of
each block, and read by all threads, in turns. Where no core is idle, ``wire`` cannot cost less than a copy with digests
and one more read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rows
import shapes
import torch

from weight_transfer.authoring import HostCopies
from weight_transfer.bench.measuring import Case
from weight_transfer.bench.turns import in_turns
from weight_transfer.memory.integrity import Digester, tensor_digests

if TYPE_CHECKING:
    from weight_transfer.bench.configurations import ModelShape

WAYS = ("none", "wire", "loaded")


def chosen(options: argparse.Namespace) -> ModelShape:
    """Return what is sent."""
    if options.tensors:
        return rows.model("small tensors", shapes.tiny(options.tensors, options.bytes))
    if options.device == "cpu":
        return rows.model("Llama", shapes.llama(options.layers or 8, 2048, 5632, 16, 8, 32064))
    return rows.model("Llama", shapes.llama(options.layers or 32, 4096, 14336, 32, 8, 128256))


def measure(backend: str, sent: ModelShape, places: tuple[str, str], workers: int, rounds: int) -> dict[str, Any]:
    """Return what sends to ``workers`` workers cost over a backend."""
    case = Case(
        model=sent,
        config={"backend": backend},
        trainers=places[:1],
        workers=places[1:] * workers,
        ways={way: {"verify": way} for way in WAYS},
        rounds=rounds,
    )
    found = rows.measured(case)
    sends = {"none": found["send"]} | {way: figures["send"] for way, figures in found["ways"].items()}
    medians = {way: figures["median"] for way, figures in sends.items()}
    best = {way: figures["min"] for way, figures in sends.items()}
    return {
        "backend": backend,
        "devices": places,
        "workers": workers,
        "tensors": len(sent.shapes),
        "bytes": sent.nbytes,
        "rounds": rounds,
        "limit": found["limit"]["median"],
        "seconds": medians,
        "ratio": {way: medians[way] / medians["none"] for way in WAYS},
        "best": best,
        "ratio of the best": {way: best[way] / best["none"] for way in WAYS},
    }


def limits(sent: ModelShape, rounds: int) -> dict[str, float]:
    """Return the seconds in which one process copies the model, copies and digests it, and reads it."""
    source = [torch.ones(shape, dtype=torch.bfloat16) for shape in sent.shapes.values()]
    target = [torch.zeros_like(tensor) for tensor in source]
    copies, numbers = HostCopies(target, source), range(len(source))
    ways: dict[str, Callable[[], object]] = {
        "copy": copies.run,
        "copy with digests": lambda: Digester(len(source)).copy(numbers, copies),
        "read": lambda: tensor_digests(source),
    }

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            since = time.perf_counter()
            run()
            return time.perf_counter() - since

        return once

    with torch.no_grad():
        return {way: min(taken) for way, taken in in_turns({way: timed(ways[way]) for way in ways}, rounds).items()}


def tell_limits(found: dict[str, float]) -> None:
    each = ", ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in found.items())
    wire = (found["copy with digests"] + found["read"]) / found["copy"]
    print(f"one process, best: {each}; a copy with digests and a read take {wire:.2f} times a copy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("ipc", "nccl", "rdma"), nargs="+", default=["ipc", "nccl", "rdma"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer", action="store_true", help="put the worker on another GPU")
    parser.add_argument("--layers", type=int, help="default is 32 on CUDA, 8 on the CPU")
    parser.add_argument("--tensors", type=int, help="send that many small ones instead of a Llama")
    parser.add_argument("--bytes", type=int, default=2048, help="of each small tensor")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    sent = chosen(options)
    print(f"{rows.machine(options.device)}; medians of {options.rounds} rounds", flush=True)
    results: list[dict[str, Any]] = [{"machine": rows.machine(options.device)}]
    if options.device == "cpu":
        limit = limits(sent, options.rounds)
        tell_limits(limit)
        results.append({"limits": limit})
    for backend in options.backend:
        apart = options.peer or backend == "nccl"
        if options.device == "cuda" and torch.cuda.device_count() < 1 + apart:
            print(f"{backend}: left out, it needs {1 + apart} CUDA devices", flush=True)
            continue
        places = rows.places(options.device, apart)
        found = measure(backend, sent, places, options.workers, options.rounds)
        results.append(found)
        print(
            f"{backend}, {' -> '.join(places)}: {found['workers']} workers, {found['tensors']} tensors, "
            f"{found['bytes'] / 1e9:.2f} GB"
        )
        for way, seconds in {"limit": found["limit"], **found["seconds"]}.items():
            rate = found["bytes"] / seconds / 1e9
            ratios = [found[ratio].get(way) for ratio in ("ratio", "ratio of the best")]
            beside = "".join(f" {ratio:8.3f}" for ratio in ratios if ratio is not None)
            print(f"  {way:8} {seconds * 1e3:9.2f} ms {rate:8.2f} GB/s{beside}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
