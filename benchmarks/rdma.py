"""Speed of the ``rdma`` backend, beside NIXL's own and a plain copy of the same bytes, in the same run.

    python benchmarks/rdma.py [--transport shm,tcp] [--workers 1,2,3] [--rounds 9]     on the CPU
    python benchmarks/rdma.py --device cuda [--workers 1] [--rounds 9]                 between GPUs

Rows: ``copy`` is ``copy_`` of a flat tensor of 4 GiB until all bytes have gone; between GPUs, from one to the other, it
is the limit; ``one READ``, one NIXL read of one descriptor; ``READ per tensor``, one descriptor each, not merged;
both by NIXL as it comes, between memory of their own; ``bare READ``, one worker's prepared reads and nothing around
them, from and into the weights themselves; ``engine``, the slowest worker's ``receive_weights``; ``update`` and
``send``, with the control calls over HTTP. Rounds alternate between all of them, so that a noisy machine disturbs them
alike; medians are compared. Each row's rate is that of one worker, or the sum of several, which all read at once.

On the CPU ``bare READ`` is the limit: it is one descriptor there, too, and between the same pages. Other pages may be
faster or slower by a seventh.

Trainer, workers and the owner of the raw reads are processes of their own. The trainer is on the first GPU, the
workers on the others in turn; on a machine with one GPU, all are on it. Before the rounds, the workers' bytes are
compared with the trainer's by integer digests after A, then B, then A again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from shapes import Weights, llama_8b, qwen_half_billion, qwen_moe, tiny

import weight_transfer as wt
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.values.deadline import Deadline
from weight_transfer_rdma.memory import memory_for
from weight_transfer_rdma.nixl import Place
from weight_transfer_rdma.receiving import RdmaWorkerEngine

BLOCK = 4 * 2**30
"""Bytes that a plain copy takes at a time: the weights and those of the raw reads leave no room for as many again."""
CASES: dict[str, dict[str, Callable[[], dict[str, tuple[int, ...]]]]] = {
    "cpu": {
        "Qwen2.5-0.5B shapes": qwen_half_billion,
        "9,000 tensors of 110 KB": lambda: tiny(9000, 110_080),
        "9,000 tensors of 2 KB": lambda: tiny(9000, 2048),
    },
    "cuda": {"Llama-3.1-8B shapes": llama_8b, "Qwen3-30B-A3B shapes, 24 layers": qwen_moe},
}
LONG = 120.0  # seconds


def digests(weights: torch.nn.Module) -> str:
    return json.dumps([tensor_digest(parameter.data) for parameter in weights.parameters()])


def work(case: str, config: dict[str, Any], device: str) -> None:
    """Be a worker: serve until standard input ends, and answer there.

    The questions are ``digests``; ``seconds``, of the engine; ``bare READ``, in seconds.
    """
    weights = Weights(CASES[torch.device(device).type][case](), torch.bfloat16, device)
    seconds = 0.0
    engine: RdmaWorkerEngine | None = None
    receive = RdmaWorkerEngine.receive_weights

    def watched(self: RdmaWorkerEngine, *arguments: Any) -> None:
        nonlocal seconds, engine
        engine, since = self, time.perf_counter()
        receive(self, *arguments)
        seconds = time.perf_counter() - since

    answers: dict[str, Callable[[], object]] = {
        "digests": lambda: digests(weights),
        "seconds": lambda: seconds,
        "bare READ": lambda: timed(lambda: read_again(engine)),
    }

    RdmaWorkerEngine.receive_weights = watched  # type: ignore[assignment, method-assign]
    with wt.WeightReceiver(config, weights) as receiver, wt.serve(receiver) as server:
        print(server.url, flush=True)
        for question in sys.stdin:
            print(answers[question.strip()](), flush=True)


def read_again(engine: RdmaWorkerEngine | None) -> None:
    """Run what the engine has prepared for the weights that it reads where they lie."""
    assert engine is not None
    agent, jobs, deadline = engine._agent, engine._jobs, Deadline(LONG)  # noqa: SLF001  (measured by themselves)
    assert agent is not None
    handles = [job.handle for job in jobs if job.handle is not None and not job.bucket]
    for handle in handles:
        agent.start(handle, 0, deadline)
    for _ in handles:
        agent.finish(deadline)


def own(nbytes: int, config: dict[str, Any], device: str) -> None:
    """Be the owner of raw reads, until standard input ends."""
    memory, deadline = memory_for(device, wt.load_config(config).options), Deadline(LONG)
    agent = memory.start_agent("raw-owner", "reader", False, deadline)
    arena = memory.arena(nbytes, deadline)
    arena.data.fill_(7)
    memory.settle()
    place = [memory.place.memory, memory.place.device]
    print(json.dumps([agent.metadata(deadline).hex(), arena.address, place]), flush=True)
    sys.stdin.read()
    agent.close()


class Child:
    """This script in another role."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, question: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self.line()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LONG)


def raw_reads(stack: ExitStack, sizes: list[int], config: dict[str, Any], devices: tuple[str, str]) -> Any:
    """Return functions that read everything with one descriptor, and with one per tensor."""
    memory, deadline = memory_for(devices[1], wt.load_config(config).options), Deadline(1e6)
    starts = np.concatenate([[0], np.cumsum(-(-np.array(sizes) // 256) * 256)])
    total = int(starts[-1])
    owner = stack.enter_context(Child("--own", str(total), "--config", json.dumps(config), "--device", devices[0]))
    agent = memory.start_agent("raw-reader", "owner", False, deadline)  # NIXL as it comes
    stack.callback(agent.close)
    arena = memory.arena(total, deadline)
    metadata, address, place = json.loads(owner.line())
    peer = agent.connect(bytes.fromhex(metadata), deadline)
    each = np.stack([starts[:-1] + arena.address, starts[:-1] + address, np.array(sizes)], axis=1).astype(np.uint64)
    one = np.array([[arena.address, address, total]], dtype=np.uint64)
    handles = [agent.prepare("READ", peer, rows, memory.place, Place(*place), deadline) for rows in (one, each)]

    def read(handle: int) -> Callable[[], None]:
        def run() -> None:
            agent.start(handle, 0, deadline)
            agent.finish(deadline)

        return run

    for handle in handles:
        read(handle)()
    if not (arena.data == 7).all():
        raise SystemExit("a raw read brought other bytes")
    return [read(handle) for handle in handles], agent.transport(memory.place)


def copying(nbytes: int, devices: tuple[str, str]) -> Callable[[], None]:
    block = min(nbytes, BLOCK)
    source = torch.ones(block, dtype=torch.uint8, device=devices[0])
    target = torch.zeros(block, dtype=torch.uint8, device=devices[1])

    def run() -> None:
        for start in range(0, nbytes, block):
            size = min(block, nbytes - start)
            target[:size].copy_(source[:size])
        if target.is_cuda:
            torch.cuda.synchronize(target.device)

    return run


def timed(call: Callable[[], Any]) -> float:
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


def measure(case: str, rounds: int, workers: int, config: dict[str, Any], kind: str) -> None:
    gpus = torch.cuda.device_count()
    others = range(1, gpus) if gpus > 1 else [0]
    places = ["cuda:0", *(f"cuda:{others[index % len(others)]}" for index in range(workers))]
    places = places if kind == "cuda" else ["cpu"] * (workers + 1)
    weights = Weights(CASES[kind][case](), torch.bfloat16, places[0])
    sizes = [parameter.nbytes for parameter in weights.parameters()]
    nbytes = sum(sizes)
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        arguments = ("--worker", case, "--config", json.dumps(config), "--device")
        children = [stack.enter_context(Child(*arguments, place)) for place in places[1:]]
        sender = stack.enter_context(wt.WeightSender(config, [child.line() for child in children]))
        for seed in (1, 2, 1):
            weights.randomise(seed)
            sender.send(weights)
            if {child.ask("digests") for child in children} != {digests(weights)}:
                raise SystemExit(f"{case}: a worker's bytes differ from the trainer's")
        (one, each), transport = raw_reads(stack, sizes, config, (places[0], places[1]))
        calls = {"one READ": one, "READ per tensor": each, "copy": copying(nbytes, (places[0], places[1]))}
        for _ in range(rounds):
            for name, call in calls.items():
                seconds.setdefault(name, []).append(timed(call))
            seconds.setdefault("bare READ", []).append(float(children[0].ask("bare READ")))
            since = time.perf_counter()
            report = sender.send(weights)
            seconds.setdefault("send", []).append(time.perf_counter() - since)
            seconds.setdefault("update", []).append(report.seconds["update"])
            seconds.setdefault("engine", []).append(max(float(child.ask("seconds")) for child in children))
    print(
        f"{case}: {len(sizes)} tensors, {nbytes / 1e9:.3f} GB, {workers} workers, {transport.kind} ({transport.path})"
    )
    limit = "copy" if kind == "cuda" else "bare READ"
    whole = nbytes / statistics.median(seconds[limit])
    for name in ("copy", "one READ", "READ per tensor", "bare READ", "engine", "update", "send"):
        median, readers = statistics.median(seconds[name]), workers if name in ("engine", "update", "send") else 1
        rate, best = readers * nbytes / median, min(seconds[name])
        print(
            f"  {name:16} {median * 1e3:9.2f} ms {rate / 1e9:8.2f} GB/s   of {limit} {rate / whole:6.3f}"
            f"   best {best * 1e3:9.2f} ms"
        )
    print(f"  extra memory of the trainer: {report.extra_memory / 2**20:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--transport", default=None, help="comma-separated; default is shm,tcp, or auto for cuda")
    parser.add_argument("--workers", default="1", help="comma-separated numbers")
    parser.add_argument("--case", default="", help="part of a case's name; default is all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--own", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.config, arguments.device)
        return
    if arguments.own:
        own(arguments.own, arguments.config, arguments.device)
        return
    kind = torch.device(arguments.device).type
    cases = [case for case in CASES[kind] if arguments.case in case]
    if not cases:
        parser.error(f"no case has {arguments.case!r} in its name; on {kind} there are {', '.join(CASES[kind])}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {arguments.rounds} rounds")
    for transport in (arguments.transport or ("auto" if kind == "cuda" else "shm,tcp")).split(","):
        config = {"backend": "rdma", "verify": "none", "timeout": LONG, "rdma": {"transport": transport}}
        for case in cases:
            for workers in map(int, arguments.workers.split(",")):
                measure(case, arguments.rounds, workers, config, kind)


if __name__ == "__main__":
    main()
