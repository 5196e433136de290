"""Speed of the ``nccl`` backend, beside the raw broadcast and other schemes in the same run.

    python benchmarks/nccl.py --device cuda --workers 1 --case dense --case moe
    python benchmarks/nccl.py --device cpu --workers 2 --case small [--layers N] [--json FILE]

These are cases of ``weight-transfer bench``: trainer and workers are processes of one host, which talk over HTTP; on
CUDA each has a GPU of its own. Rows:

* ``limit``: broadcasts of one buffer (1 GiB on CUDA, all bytes on the CPU), again and again, until all bytes have gone;
* ``engine``: the slowest worker's ``receive_weights``, until its GPU has done all of it;
* ``update``, that phase in the trainer; ``send``: ``WeightSender.send``, all phases;
* ``per tensor``: one broadcast per weight, from and into its own storage;
* ``packed``: two buffers of 1 GiB: concatenate, broadcast, split, copy into the weights (vLLM's scheme, written
  afresh from its description).

They take turns; medians are compared. For each way that moves weights, the bits of every worker are compared after A,
then B, then A again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import rows
import shapes
import torch

from weight_transfer.bench.measuring import Case
from weight_transfer.bench.placing import devices
from weight_transfer.errors import ConfigError

CASES = {
    "dense": shapes.llama_8b,
    "moe": shapes.qwen_moe,
    "small": shapes.qwen_half_billion,
    "toy": shapes.toy,
    "toy-moe": shapes.toy_moe,
}
SCHEMES = {"per tensor": "nccl_schemes:PerTensor", "packed": "nccl_schemes:Packed"}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case; print its table, and return its figures, JSON-safe."""
    try:
        trainers, workers = devices(arguments.device, 1, arguments.workers, True, torch.cuda.device_count())
    except ConfigError as error:
        raise SystemExit(f"nccl on {arguments.device}: {error}") from error
    model = rows.model(name, shapes.first_layers(CASES[name](), arguments.layers))
    case = Case(
        model=model,
        config={
            "backend": "nccl",
            "verify": "none",
            "bucket_bytes": arguments.bucket,
            "nccl": {"direct_bytes": arguments.direct},
        },
        trainers=trainers,
        workers=workers,
        schemes={scheme: made for scheme, made in SCHEMES.items() if scheme not in arguments.skip},
        rounds=arguments.rounds,
    )
    found = rows.measured(case)
    print(
        f"{name}: {len(model.shapes)} tensors, {model.nbytes / 1e9:.2f} GB, 1 -> {arguments.workers}, bits equal after "
        "A, B, A"
    )
    rows.show_memory(found["memory"])
    timed = rows.rows_of(found)
    rows.show(timed)
    return {
        "case": name,
        "device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "tensors": len(model.shapes),
        "nbytes": model.nbytes,
        "memory": found["memory"],
        "rows": rows.as_json(timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--case", choices=sorted(CASES), action="append", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket", default="256MiB")
    parser.add_argument("--direct", default="8MiB")
    parser.add_argument("--skip", choices=sorted(SCHEMES), action="append", default=[])
    parser.add_argument("--layers", type=int, help="of the model, all by default")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    print(f"{rows.machine(arguments.device)}; medians of {arguments.rounds} rounds", flush=True)
    found = [measure(case, arguments) for case in arguments.case]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
