"""Speed of the ``rdma`` backend, beside NIXL's own and a plain copy of the same bytes, in the same run.

    python benchmarks/rdma.py [--transport shm,tcp] [--workers 1,2,3] [--rounds 9]     on the CPU
    python benchmarks/rdma.py --device cuda [--workers 1] [--rounds 9]                 between GPUs

These are cases of ``weight-transfer bench``, with further rows: ``limit`` is one NIXL read of one descriptor, as the
engines' agents make it; ``copy``, a plain copy by each worker: between GPUs from the trainer's; ``READ per tensor``, a
read with a descriptor each, not merged, by NIXL as it comes; ``bare READ``, the worker's prepared reads and nothing
around them, from and into the weights themselves; ``engine``, the slowest worker's ``receive_weights``; ``update`` and
``send``, with the control calls over HTTP. All take turns; medians are compared. All workers do the same at once; rates
are those of one. Pages of other memory may be faster or slower by a seventh.

Trainer and workers are processes. The trainer is on the first GPU, the workers on the others in turn; on a machine with
one GPU, all are on it. Before the rounds, all bits of the workers are compared after A, then B, then A again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import rows
import torch
from shapes import llama_8b, qwen_half_billion, qwen_moe, tiny

from weight_transfer.bench.measuring import Case

CASES: dict[str, dict[str, Callable[[], dict[str, tuple[int, ...]]]]] = {
    "cpu": {
        "Qwen2.5-0.5B shapes": qwen_half_billion,
        "9,000 tensors of 110 KB": lambda: tiny(9000, 110_080),
        "9,000 tensors of 2 KB": lambda: tiny(9000, 2048),
    },
    "cuda": {"Llama-3.1-8B shapes": llama_8b, "Qwen3-30B-A3B shapes, 24 layers": qwen_moe},
}
SCHEMES = {
    "copy": "weight_transfer_ipc.limit:limit",
    "READ per tensor": "rdma_schemes:PerTensor",
    "bare READ": "rdma_schemes:BareRead",
}
LONG = 120.0  # seconds


def places(kind: str, workers: int) -> list[str]:
    """Return the devices of the trainer and of the workers."""
    if kind == "cpu":
        return ["cpu"] * (workers + 1)
    gpus = torch.cuda.device_count()
    others = range(1, gpus) if gpus > 1 else [0]
    return ["cuda:0", *(f"cuda:{others[index % len(others)]}" for index in range(workers))]


def measure(name: str, rounds: int, workers: int, transport: str, kind: str) -> None:
    """Measure one case, and print its table."""
    model = rows.model(name, CASES[kind][name]())
    devices = places(kind, workers)
    case = Case(
        model=model,
        config={"backend": "rdma", "verify": "none", "rdma": {"transport": transport}},
        trainers=devices[:1],
        workers=devices[1:],
        schemes=SCHEMES,
        rounds=rounds,
        timeout=LONG,
    )
    found = rows.measured(case)
    print(
        f"{name}: {len(model.shapes)} tensors, {model.nbytes / 1e9:.3f} GB, {workers} workers, {found['transport']}, "
        "bits equal after A, B, A"
    )
    rows.show(rows.rows_of(found))
    rows.show_memory(found["memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--transport", default=None, help="comma-separated; default is shm,tcp, or auto for cuda")
    parser.add_argument("--workers", default="1", help="comma-separated numbers")
    parser.add_argument("--case", default="", help="part of a case's name; default is all")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    kind = arguments.device
    cases = [case for case in CASES[kind] if arguments.case in case]
    if not cases:
        parser.error(f"no case has {arguments.case!r} in its name; on {kind} there are {', '.join(CASES[kind])}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    print(f"{rows.machine(kind)}; medians of {arguments.rounds} rounds", flush=True)
    for transport in (arguments.transport or ("auto" if kind == "cuda" else "shm,tcp")).split(","):
        for case in cases:
            for workers in map(int, arguments.workers.split(",")):
                measure(case, arguments.rounds, workers, transport, kind)


if __name__ == "__main__":
    main()
