"""Speed of the ``ipc`` backend, beside one plain copy of the same bytes in the same run.

    python benchmarks/ipc.py [--rounds 12] [--export adopt|stage]
    python benchmarks/ipc.py --device cuda [--peer] [--case dense --case moe] [--rounds 12] [--export adopt|stage]

With ``--device cuda`` see `ipc_cuda`; ``--peer`` puts the worker on another GPU. On CPU tensors these are cases of
``weight-transfer bench`` with other weights: trainer and worker are two processes that talk over HTTP; updates and the
copy take turns; every element is compared after A, then B, then A again, and once more in the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from shapes import qwen_half_billion, tiny

from weight_transfer.bench.configurations import ModelShape
from weight_transfer.bench.measuring import Case, measure

CASES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "Qwen2.5-0.5B shapes": qwen_half_billion,
    "9,000 tensors of 2 KB": lambda: tiny(9000, 2048),
}


def show(name: str, rounds: int, config: dict[str, Any]) -> None:
    model = ModelShape(name=name, shapes=CASES[name](), layers=1, published_layers=1, width=1)
    found = measure(Case(model=model, config=config, trainers=["cpu"], workers=["cpu"], rounds=rounds))
    print(f"{name}: {len(model.shapes)} tensors, {model.nbytes / 1e9:.3f} GB, bits equal after A, B, A")
    titles = {"limit": "copy_ of the same bytes", "send": "send", "update": "its update phase", "engine": "its engine"}
    for row, title in titles.items():
        figures = found[row]
        ratio = figures.get("of_limit", 1.0)
        print(f"  {title:24} {figures['median'] * 1e3:8.1f} ms {figures['gbps']:8.2f} GB/s   ratio {ratio:5.2f}")
    print(f"  extra memory of the trainer: {found['extra_memory'] / 2**20:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--peer", action="store_true", help="put the worker on another GPU")
    parser.add_argument("--case", choices=("dense", "moe"), action="append", help="on CUDA; default is both")
    parser.add_argument("--export", choices=("adopt", "stage"), default="adopt")
    arguments = parser.parse_args()
    config: dict[str, Any] = {"backend": "ipc", "verify": "none", "ipc": {"export": arguments.export}}
    if arguments.device == "cuda":
        import ipc_cuda

        print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}; medians of {arguments.rounds} rounds")
        for case in arguments.case or ("dense", "moe"):
            ipc_cuda.measure(case, arguments.peer, arguments.rounds, config)
        return
    print(f"torch {torch.__version__}, one worker; medians of {arguments.rounds} rounds")
    for name in CASES:
        show(name, arguments.rounds, config)


if __name__ == "__main__":
    main()
