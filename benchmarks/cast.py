"""Cost of a cast: fp32 masters sent as bf16 with fp32 routers, beside an exact send of the same bytes in the same run.

    python benchmarks/cast.py --backend ipc|nccl|rdma [--device cuda] [--peer] [--layers 8] [--json FILE]

The trainer holds fp32 masters, and a twin of what the worker should have, made with ``tensor.to``. These are cases of
``weight-transfer bench`` with two senders, and the limit beside them. Rows:

* ``cast``: ``WeightSender.send`` of the masters with ``cast``, all its phases, over HTTP; and its update phase alone;
* ``exact``: the same of the twin, whose bytes are those that the cast ones become;
* ``to()``: the cast alone, into new tensors, one after another, on the trainer's device.

They take turns, medians are compared. Before, the worker's bits are compared with those of ``tensor.to`` after A, then
B, then A again, for both. With ``--peer`` the worker is on another GPU, which ``nccl`` on CUDA always needs. Shapes are
Llama-3.1-8B's with ``--layers`` layers and a router per layer; on the CPU a quarter as wide, with a quarter of the
vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import rows
import shapes
from cast_members import WithRouters

from weight_transfer.bench.measuring import Case

CAST = {"*": "bfloat16", "*router*": "float32"}
EXPERTS = 64


def named(layers: int, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is sent."""
    wide = kind == "cuda"
    found = shapes.llama(layers, 4096, 14336, 32, 8, 128256) if wide else shapes.llama(layers, 1024, 3584, 16, 4, 32064)
    hidden = found["model.norm.weight"]
    return found | {f"model.layers.{layer}.mlp.router.weight": (EXPERTS, *hidden) for layer in range(layers)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    kind = arguments.device
    places = rows.places(kind, arguments.peer or arguments.backend == "nccl")
    config: dict[str, Any] = {"backend": arguments.backend, "verify": "none"}
    config |= {"bucket_bytes": arguments.bucket} if arguments.bucket else {}
    model = rows.model("Llama with routers", named(arguments.layers, kind))
    case = Case(
        model=model,
        config=config,
        trainers=places[:1],
        workers=places[1:],
        ways={"cast": {"cast": CAST}, "exact": {}},
        schemes={"to()": "cast_trainer:CastAlone"},
        roles=("cast_trainer", "cast_worker"),
        rounds=arguments.rounds,
    )
    found = rows.measured(case)
    exact = found["ways"]["exact"]
    medians = {
        "cast": found["send"]["median"],
        "cast, update": found["update"]["median"],
        "exact": exact["send"]["median"],
        "exact, update": exact["update"]["median"],
        "to()": found["schemes"]["to()"]["median"],
    }
    return {
        "backend": arguments.backend,
        "devices": places,
        "machine": rows.machine(kind),
        "tensors": len(model.shapes),
        "bytes": sum(math.prod(shape) * WithRouters.dtype(name).itemsize for name, shape in model.shapes.items()),
        "rounds": arguments.rounds,
        "bits equal to tensor.to after A, B, A": found["bits_equal"],
        "extra memory": {"cast": found["extra_memory"], "exact": exact["extra_memory"]},
        "seconds": medians,
        "ratio": medians["cast"] / medians["exact"],
        "ratio of the update phases": medians["cast, update"] / medians["exact, update"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("ipc", "nccl", "rdma"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer", action="store_true", help="put the worker on another GPU")
    parser.add_argument("--layers", type=int, help="default is 8 on CUDA, 2 on the CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bucket", help='bucket_bytes, such as "64MiB"')
    parser.add_argument("--json", type=Path, help="append the result to this file, a line each")
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (8 if arguments.device == "cuda" else 2)
    found = measure(arguments)
    print(
        f"{found['backend']}, {' -> '.join(found['devices'])} ({found['machine']}): {found['tensors']} tensors, "
        f"{found['bytes'] / 1e9:.2f} GB, bits equal to tensor.to after A, B, A; medians of {arguments.rounds} rounds"
    )
    for name, seconds in found["seconds"].items():
        rate = found["bytes"] / seconds / 1e9
        print(f"  {name:16} {seconds * 1e3:9.2f} ms {rate:9.2f} GB/s")
    print(f"  cast / exact: {found['ratio']:.3f}, of the update phases {found['ratio of the update phases']:.3f}")
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
