"""Cost of ``verify``: the same weights sent without it, with ``wire`` and with ``loaded``, in the same run.

    python benchmarks/verify.py [--backend ipc nccl rdma] [--device cuda] [--peer] [--json FILE]
        [--layers 8 | --tensors 9000 --bytes 2048] [--workers 2]

Trainer and workers are a process each and talk over HTTP; the workers copy by name. Rounds alternate between the three,
medians of whole sends are compared, and the best ones, which a busy machine disturbs least. Before, the worker's bytes
are compared with the trainer's after A, then B, then A again, for each of the three. With ``--peer`` the worker is on
another GPU, which ``nccl`` on CUDA always needs. Shapes are Llama-3.1-8B's with ``--layers`` layers, or all 32; on the
CPU half as wide, with a quarter of the vocabulary, 1 GB. With ``--tensors`` they are that many small ones instead, of
``--bytes`` each, whose cost is not that of the bytes.

On the CPU the limit is measured beside it: the same bytes copied by all threads, copied with digests of each block, and
read by all threads, one after another in each round. Where no core is idle, ``wire`` cannot cost less than a copy with
digests and one more read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import actors
import shapes
import torch

import weight_transfer as wt
from weight_transfer.authoring import HostCopies
from weight_transfer.memory.integrity import Digester, tensor_digests

WAYS = ("none", "wire", "loaded")
LIFE = 540.0  # seconds of the worker's process
PATIENCE = 120.0  # seconds of one answer


def chosen(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return what is sent."""
    if options.tensors:
        return shapes.tiny(options.tensors, options.bytes)
    if options.device == "cuda":
        return shapes.llama(options.layers or 32, 4096, 14336, 32, 8, 128256)
    return shapes.llama(options.layers or 8, 2048, 5632, 16, 8, 32064)


def model(named: dict[str, tuple[int, ...]], device: str) -> shapes.Weights:
    return shapes.Weights(named, torch.bfloat16, device)


def quiet(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class Worker:
    """One model, and a receiver for each sender; made inside of its process."""

    def __init__(self, config: dict[str, Any], named: dict[str, tuple[int, ...]], device: str) -> None:
        if device != "cpu":
            torch.cuda.set_device(device)
        self._weights = model(named, device)
        self._receivers = [wt.WeightReceiver(config, self._weights) for _ in WAYS]
        self._servers = [wt.serve(receiver) for receiver in self._receivers]

    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def forget(self) -> None:
        for parameter in self._weights.parameters():
            parameter.data.zero_()

    def digests(self) -> list[str]:
        return tensor_digests(list(self._weights.parameters()))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for receiver in self._receivers:
            receiver.close()


def measure(
    backend: str, places: tuple[str, str], named: dict[str, tuple[int, ...]], count: int, rounds: int
) -> dict[str, Any]:
    """Return what sends to ``count`` workers cost over a backend."""
    config = {"backend": backend, "timeout": 60, "init_timeout": 60}
    workers = [actors.Actor(f"worker {each}", LIFE, Worker, config, named, places[1]) for each in range(count)]
    weights = model(named, places[0])
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        of_ways = zip(*actors.ask(workers, PATIENCE, "urls"), strict=True)
        senders = {
            way: wt.WeightSender({**config, "verify": way}, urls) for way, urls in zip(WAYS, of_ways, strict=True)
        }
        for way, sender in senders.items():
            for seed in (1, 2, 1):
                weights.randomise(seed)
                actors.ask(workers, PATIENCE, "forget")
                sender.send(weights)
                if actors.ask(workers, PATIENCE, "digests") != [tensor_digests(list(weights.parameters()))] * count:
                    raise SystemExit(f"{backend}, {way}: a worker has other bytes than the trainer")
        for _ in range(rounds + 1):
            for way, sender in senders.items():
                quiet(places[0])
                since = time.perf_counter()
                report = sender.send(weights)
                times[way].append(time.perf_counter() - since)
        for sender in senders.values():
            sender.close()
    finally:
        actors.end(workers)
    medians = {way: statistics.median(values[1:]) for way, values in times.items()}
    best = {way: min(values[1:]) for way, values in times.items()}
    return {
        "backend": backend,
        "devices": places,
        "device": torch.cuda.get_device_name(0) if places[0] != "cpu" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "workers": count,
        "tensors": report.params,
        "bytes": report.nbytes,
        "rounds": rounds,
        "seconds": medians,
        "ratio": {way: medians[way] / medians["none"] for way in WAYS},
        "best": best,
        "ratio of the best": {way: best[way] / best["none"] for way in WAYS},
    }


def limits(named: dict[str, tuple[int, ...]], rounds: int) -> dict[str, float]:
    """Return the seconds in which one process copies the model, copies and digests it, and reads it."""
    sent, received = model(named, "cpu"), model(named, "cpu")
    sent.randomise(1)
    source, target = list(sent.parameters()), list(received.parameters())
    copies, numbers = HostCopies(target, source), range(len(source))
    ways: dict[str, Callable[[], object]] = {
        "copy": copies.run,
        "copy with digests": lambda: Digester(len(source)).copy(numbers, copies),
        "read": lambda: tensor_digests(source),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for way, run in ways.items():
                since = time.perf_counter()
                run()
                times[way].append(time.perf_counter() - since)
    return {way: min(values[1:]) for way, values in times.items()}


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
    parser.add_argument("--tensors", type=int, help="send so many small ones instead")
    parser.add_argument("--bytes", type=int, default=2048, help="of each of these")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    named = chosen(options)
    results: list[dict[str, Any]] = []
    if options.device == "cpu":
        limit = limits(named, options.rounds)
        tell_limits(limit)
        results.append({"limits": limit})
    for backend in options.backend:
        apart = options.peer or backend == "nccl"
        places = ("cpu", "cpu") if options.device == "cpu" else ("cuda:0", "cuda:1" if apart else "cuda:0")
        if options.device == "cuda" and torch.cuda.device_count() <= int(places[1][-1]):
            print(f"{backend}: left out, it needs {places[1]}", flush=True)
            continue
        found = measure(backend, places, named, options.workers, options.rounds)
        results.append(found)
        print(
            f"{backend}, {' -> '.join(places)} ({found['device']}): {found['workers']} workers, "
            f"{found['tensors']} tensors, {found['bytes'] / 1e9:.2f} GB; medians of {options.rounds} rounds",
            flush=True,
        )
        for way, seconds in found["seconds"].items():
            rate, ratios = found["bytes"] / seconds / 1e9, (found["ratio"][way], found["ratio of the best"][way])
            print(f"  {way:8} {seconds * 1e3:9.2f} ms {rate:8.2f} GB/s {ratios[0]:8.3f} {ratios[1]:8.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
