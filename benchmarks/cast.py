"""Cost of a cast: fp32 masters sent as bf16 with fp32 routers, beside an exact send of the same bytes in the same run.

    python benchmarks/cast.py --backend ipc|nccl|rdma [--device cuda] [--peer] [--layers 8] [--json FILE]

The trainer holds fp32 masters, and a twin of what the worker should have, made with ``tensor.to``. Rows:

* ``cast``: ``WeightSender.send`` of the masters with ``cast``, all its phases, over HTTP; and its update phase alone;
* ``exact``: the same of the twin, whose bytes are those that the cast ones become;
* ``to()``: the cast alone, into new tensors, one after another, on the trainer's device.

Rounds alternate between them, medians are compared. Before, the worker's bytes are compared with the twin's after A,
then B, then A again, and once after an exact send. With ``--peer`` the worker is on another GPU, which ``nccl`` on CUDA
always needs. Shapes are Llama-3.1-8B's with ``--layers`` layers and a router per layer; on the CPU a quarter as wide,
with a quarter of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shapes
import torch

import weight_transfer as wt
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.model.manifest import digest_json

CAST = {"*": "bfloat16", "*router*": "float32"}
EXPERTS = 64


def model(layers: int, kind: str, dtype: torch.dtype, device: str) -> shapes.Weights:
    """Return weights of ``dtype``, routers in fp32."""
    wide = kind == "cuda"
    names = shapes.llama(layers, 4096, 14336, 32, 8, 128256) if wide else shapes.llama(layers, 1024, 3584, 16, 4, 32064)
    hidden = names["model.norm.weight"]
    names |= {f"model.layers.{layer}.mlp.router.weight": (EXPERTS, *hidden) for layer in range(layers)}
    weights = shapes.Weights(names, dtype, device)
    for name, parameter in weights.named_parameters():
        if "router" in name:
            parameter.data = parameter.data.float()
    return weights


def digest(weights: torch.nn.Module) -> str:
    return digest_json([tensor_digest(parameter.data) for parameter in weights.parameters()])


def quiet(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def work(pipe: Connection, layers: int, kind: str, device: str, config: dict[str, Any]) -> None:
    """Be the worker: one model, and a receiver for each of the two senders."""
    if kind == "cuda":
        torch.cuda.set_device(device)
    weights = model(layers, kind, torch.bfloat16, device)
    with (
        wt.WeightReceiver(config, weights) as cast,
        wt.WeightReceiver(config, weights) as exact,
        wt.serve(cast) as first,
        wt.serve(exact) as second,
    ):
        pipe.send((first.url, second.url))
        while (command := pipe.recv()) != "stop":
            if command == "forget":
                for parameter in weights.parameters():
                    parameter.data.zero_()
                quiet(device)
                pipe.send(None)
            else:
                pipe.send(digest(weights))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    kind = arguments.device
    peer = arguments.peer or arguments.backend == "nccl"
    places = ("cuda:0", "cuda:1" if peer else "cuda:0") if kind == "cuda" else ("cpu", "cpu")
    if kind == "cuda" and torch.cuda.device_count() <= int(places[1][-1]):
        raise SystemExit(f"needs {places[1]}; this machine has {torch.cuda.device_count()} CUDA devices")
    config: dict[str, Any] = {"backend": arguments.backend, "verify": "none", "timeout": 60, "init_timeout": 60}
    config |= {"bucket_bytes": arguments.bucket} if arguments.bucket else {}
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, arguments.layers, kind, places[1], config), daemon=True)
    process.start()
    theirs.close()
    masters = model(arguments.layers, kind, torch.float32, places[0])
    twin = model(arguments.layers, kind, torch.bfloat16, places[0])

    def ask(command: str) -> Any:
        pipe.send(command)
        return pipe.recv()

    def fill(seed: int) -> None:
        masters.randomise(seed)
        for mine, theirs in zip(twin.parameters(), masters.parameters(), strict=True):
            mine.data.copy_(theirs.data.to(mine.dtype))
        ask("forget")

    def check(what: str) -> None:
        if ask("digest") != digest(twin):
            raise SystemExit(f"{what}: the worker's bytes differ from those of tensor.to")

    def cast_alone() -> None:
        for mine, theirs in zip(twin.parameters(), masters.parameters(), strict=True):
            theirs.data.to(mine.dtype)
        quiet(places[0])

    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        quiet(places[0])
        since = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - since)
        return result

    urls = pipe.recv()
    with (
        wt.WeightSender({**config, "cast": CAST}, [urls[0]]) as casting,
        wt.WeightSender(config, [urls[1]]) as exact,
    ):
        for seed in (1, 2, 1):
            fill(seed)
            report = casting.send(masters)
            check("cast")
        fill(2)
        exact.send(twin)
        check("exact")
        for _ in range(arguments.rounds + 1):
            report = timed("cast", lambda: casting.send(masters))
            times.setdefault("cast, update", []).append(report.seconds["update"])
            plain = timed("exact", lambda: exact.send(twin))
            times.setdefault("exact, update", []).append(plain.seconds["update"])
            timed("to()", cast_alone)
        check("the last round")
    pipe.send("stop")
    process.join(30)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "backend": arguments.backend,
        "devices": places,
        "device": torch.cuda.get_device_name(0) if kind == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "tensors": report.params,
        "bytes": report.nbytes,
        "rounds": arguments.rounds,
        "bits equal to tensor.to after A, B, A": True,
        "extra memory": {"cast": report.extra_memory, "exact": plain.extra_memory},
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
        f"{found['backend']}, {' -> '.join(found['devices'])} ({found['device']}): {found['tensors']} tensors, "
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
