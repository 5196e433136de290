"""Speed of the ``ipc`` backend, beside one plain copy of the same bytes in the same run.

    python benchmarks/ipc.py [--rounds 12] [--export adopt|stage]
    python benchmarks/ipc.py --device cuda [--peer] [--case dense --case moe] [--rounds 12] [--export adopt|stage]

With ``--device cuda`` see `ipc_cuda`; ``--peer`` puts the worker on another GPU. On CPU tensors, trainer and worker are
two processes; the worker answers over HTTP, as in production. Rounds alternate between an update and a ``copy_`` of one
flat tensor of the same size with the same number of threads, so that a noisy machine disturbs both alike; medians are
compared. Every update carries new random weights, and at the end the worker's bytes are compared with the trainer's by
SHA-256, after A, then B, then A again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import Weights, qwen_half_billion, tiny

import weight_transfer as wt

CASES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "Qwen2.5-0.5B shapes": qwen_half_billion,
    "9,000 tensors of 2 KB": lambda: tiny(9000, 2048),
}


def sha256(weights: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in weights.parameters():
        digest.update(parameter.data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def work(case: str, config: str) -> None:
    """Be the worker: serve until standard input ends, and answer each line there with a digest."""
    weights = Weights(CASES[case](), torch.bfloat16)
    with wt.WeightReceiver(json.loads(config), weights) as receiver, wt.serve(receiver) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(sha256(weights), flush=True)


def measure(case: str, rounds: int, config: dict[str, Any]) -> None:
    weights = Weights(CASES[case](), torch.bfloat16)
    nbytes = sum(parameter.nbytes for parameter in weights.parameters())
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    command = [sys.executable, __file__, "--worker", case, "--worker-config", json.dumps(config)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    sends, updates, copies = [], [], []
    try:
        with wt.WeightSender(config, [worker.stdout.readline().strip()]) as sender:
            for seed in (1, 2, 1):
                weights.randomise(seed)
                report = sender.send(weights)
                worker.stdin.write("digest\n")
                worker.stdin.flush()
                if worker.stdout.readline().strip() != sha256(weights):
                    raise SystemExit(f"{case}: the worker's bytes differ from the trainer's")
            for _ in range(rounds):
                since = time.perf_counter()
                target.copy_(source)
                copies.append(time.perf_counter() - since)
                since = time.perf_counter()
                report = sender.send(weights)
                sends.append(time.perf_counter() - since)
                updates.append(report.seconds["update"])
    finally:
        worker.stdin.close()
        worker.wait(30)
    copy, send, update = map(statistics.median, (copies, sends, updates))
    print(f"{case}: {report.params} tensors, {nbytes / 1e9:.3f} GB, bits equal after A, B, A")
    for name, seconds in (("copy_ of the same bytes", copy), ("send", send), ("its update phase", update)):
        print(f"  {name:24} {seconds * 1e3:8.1f} ms {nbytes / seconds / 1e9:8.2f} GB/s   ratio {copy / seconds:5.2f}")
    print(f"  extra memory of the trainer: {report.extra_memory / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer", action="store_true", help="put the worker on another GPU")
    parser.add_argument("--case", choices=("dense", "moe"), action="append", help="on CUDA; default is both")
    parser.add_argument("--export", choices=("adopt", "stage"), default="adopt")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-config", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.worker_config)
        return
    config: dict[str, Any] = {"backend": "ipc", "ipc": {"export": arguments.export}}
    if arguments.device == "cuda":
        import ipc_cuda

        print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}; medians of {arguments.rounds} rounds")
        for case in arguments.case or ("dense", "moe"):
            ipc_cuda.measure(case, arguments.peer, arguments.rounds, config)
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, one worker; medians of {arguments.rounds} rounds")
    for case in CASES:
        measure(case, arguments.rounds, config)


if __name__ == "__main__":
    main()
