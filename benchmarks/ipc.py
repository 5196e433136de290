"""Speed of the ``ipc`` backend, beside plain copies of the same bytes in the same run.

    python benchmarks/ipc.py [--rounds 12] [--export adopt|stage]
    python benchmarks/ipc.py --device cuda [--peer] [--case dense --case moe] [--rounds 12] [--export adopt|stage]

These are cases of ``weight-transfer bench`` with other weights: trainer and worker are two processes that talk over
HTTP; updates and the copies take turns; every element is compared after A, then B, then A again. With ``--device cuda``
both are on one GPU, with ``--peer`` the worker is on another one, and there are two further rows:

* ``packed``: buffers of 1 GiB: concatenate, share the handle, map, split, copy, unmap, answer (vLLM's packed scheme,
  written afresh from its description);
* ``unpacked``: a handle per tensor, shared, mapped and unmapped at each update, a copy per tensor (vLLM's other one).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import rows
from shapes import llama_8b, qwen_half_billion, qwen_moe, tiny

from weight_transfer.bench.measuring import Case

CASES: dict[str, dict[str, Callable[[], dict[str, tuple[int, ...]]]]] = {
    "cpu": {"Qwen2.5-0.5B shapes": qwen_half_billion, "9,000 tensors of 2 KB": lambda: tiny(9000, 2048)},
    "cuda": {"dense": llama_8b, "moe": qwen_moe},
}
SCHEMES = {
    "cpu": {},
    "cuda": {"packed": "ipc_schemes:Packed", "unpacked": "ipc_schemes:Unpacked"},
}


def show(name: str, device: str, places: tuple[str, str], rounds: int, config: dict[str, Any]) -> None:
    """Measure one case, and print its table."""
    model = rows.model(name, CASES[device][name]())
    trainer, worker = places
    case = Case(
        model=model, config=config, trainers=[trainer], workers=[worker], schemes=SCHEMES[device], rounds=rounds
    )
    found = rows.measured(case)
    print(
        f"{name}: {len(model.shapes)} tensors, {model.nbytes / 1e9:.3f} GB, {trainer} -> {worker}, bits equal after "
        f"A, B, A; limit: {found['limit']['what']}"
    )
    rows.show(rows.rows_of(found))
    rows.show_memory(found["memory"], ", the first update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--peer", action="store_true", help="put the worker on another GPU")
    parser.add_argument("--case", choices=sorted(CASES["cuda"]), action="append", help="on CUDA; default is both")
    parser.add_argument("--export", choices=("adopt", "stage"), default="adopt")
    arguments = parser.parse_args()
    device = arguments.device
    places = rows.places(device, arguments.peer)
    config: dict[str, Any] = {"backend": "ipc", "verify": "none", "ipc": {"export": arguments.export}}
    print(f"{rows.machine(device)}; one worker; medians of {arguments.rounds} rounds", flush=True)
    for name in (arguments.case if device == "cuda" else None) or CASES[device]:
        show(name, device, places, arguments.rounds, config)


if __name__ == "__main__":
    main()
