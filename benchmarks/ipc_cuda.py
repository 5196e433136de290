"""The CUDA half of ``benchmarks/ipc.py``: trainer and worker on one GPU, or on two.

In one run, in alternating rounds:

* ``limit``: a plain ``copy_`` out of 4 GiB of the trainer's memory, again and again, until all bytes have gone;
* ``ours``: ``WeightSender.send``, all its phases, over HTTP and over a pipe; its update phase alone; and the worker's
  engine alone, which does what the limit does: all bytes are copied and checked in when it returns;
* ``packed``: buffers of 1 GiB: concatenate, share the handle, map, split, copy, unmap, answer (vLLM's packed scheme,
  written afresh from its description);
* ``unpacked``: a handle per tensor, shared, mapped and unmapped at each update, a copy per tensor (vLLM's other one).
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import shapes
import torch
from torch import nn

import weight_transfer as wt
from weight_transfer.errors import WeightTransferError, error_from_dict, error_to_dict
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.model.manifest import digest_json
from weight_transfer_ipc import cuda
from weight_transfer_ipc.device_memory import bytes_at
from weight_transfer_ipc.engine import IpcWorkerEngine

CASES = {"dense": shapes.llama_8b, "moe": shapes.qwen_moe}
GIB = 2**30
LIMIT = 4 * GIB
CALLS = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "abort_weight_update",
    "status",
)


class PipeChannel:
    """A control channel over a pipe, in JSON: what a trainer that starts its workers itself would use."""

    address = "pipe"

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in CALLS:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self._pipe.send_bytes(json.dumps([name, *arguments]).encode())
            answer = json.loads(self._pipe.recv_bytes())
            if "error" in answer:
                raise error_from_dict(answer["error"])
            return answer["result"]

        return call


def answer(pipe: Connection, receiver: wt.WeightReceiver, request: bytes) -> None:
    """Answer one call of a `PipeChannel`."""
    name, *arguments = json.loads(request)
    if name not in CALLS:
        raise SystemExit(f"unknown call {name}")
    try:
        pipe.send_bytes(json.dumps({"result": getattr(receiver, name)(*arguments)}).encode())
    except WeightTransferError as error:
        pipe.send_bytes(json.dumps({"error": error_to_dict(error)}).encode())


def digest(weights: nn.Module) -> str:
    return digest_json([tensor_digest(parameter) for parameter in weights.parameters()])


def where(tensor: torch.Tensor) -> tuple[str, int, int]:
    """Export a tensor's allocation; return its handle, its size and the tensor's place in it."""
    address, device = tensor.data_ptr(), tensor.device.index
    begin, nbytes = cuda.allocation_at(address, device)
    return cuda.export(begin, device), nbytes, address - begin


class Mapped:
    """Maps an allocation in a ``with`` block, and gives its bytes."""

    def __init__(self, handle: str, nbytes: int, device: torch.device) -> None:
        self._handle, self._nbytes, self._device = handle, nbytes, device

    def __enter__(self) -> torch.Tensor:
        self._address = cuda.open_handle(self._handle, self._device.index)
        return bytes_at(self._address, self._nbytes, self._device)

    def __exit__(self, *_: object) -> None:
        cuda.close_handle(self._address, self._device.index)


def split(weights: nn.Module) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    total = 0
    for parameter in weights.parameters():
        if chunk and total + parameter.nbytes > GIB:
            yield chunk
            chunk, total = [], 0
        chunk.append(parameter.data)
        total += parameter.nbytes
    yield chunk


def receive_packed(pipe: Connection, weights: nn.Module, device: torch.device) -> None:
    for chunk in split(weights):
        handle, nbytes, offset = json.loads(pipe.recv_bytes())
        with Mapped(handle, nbytes, device) as memory:
            sizes = [tensor.nbytes for tensor in chunk]
            for tensor, part in zip(chunk, memory[offset : offset + sum(sizes)].split(sizes), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            torch.cuda.synchronize(device)
        pipe.send_bytes(b"1")


def send_packed(pipe: Connection, weights: nn.Module, buffer: torch.Tensor) -> None:
    for chunk in split(weights):
        parts = [tensor.view(-1).view(torch.uint8) for tensor in chunk]
        torch.cat(parts, out=buffer[: sum(part.numel() for part in parts)])
        torch.cuda.synchronize()
        pipe.send_bytes(json.dumps(where(buffer)).encode())
        pipe.recv_bytes()


def receive_unpacked(pipe: Connection, weights: nn.Module, device: torch.device) -> None:
    for parameter, (handle, nbytes, offset) in zip(weights.parameters(), json.loads(pipe.recv_bytes()), strict=True):
        with Mapped(handle, nbytes, device) as memory:
            part = memory[offset : offset + parameter.nbytes]
            parameter.data.copy_(part.view(parameter.dtype).view(parameter.shape))
            del part, memory
    torch.cuda.synchronize(device)
    pipe.send_bytes(b"1")


def send_unpacked(pipe: Connection, weights: nn.Module) -> None:
    pipe.send_bytes(json.dumps([where(parameter.data) for parameter in weights.parameters()]).encode())
    pipe.recv_bytes()


def watch_engine() -> list[float]:
    """Return a list that grows by the seconds of each ``receive_weights`` of a worker's engine in this process."""
    seconds: list[float] = []
    receive = IpcWorkerEngine.receive_weights

    def timed(*arguments: Any) -> None:
        since = time.perf_counter()
        receive(*arguments)
        seconds.append(time.perf_counter() - since)

    IpcWorkerEngine.receive_weights = timed  # type: ignore[assignment, method-assign]
    return seconds


def work(pipe: Connection, case: str, device_name: str, config: dict[str, Any], shared: tuple[str, int, int]) -> None:
    """Be the worker."""
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    weights = shapes.Weights(CASES[case](), torch.bfloat16, device_name)
    total = sum(parameter.nbytes for parameter in weights.parameters())
    target = torch.empty(LIMIT, dtype=torch.uint8, device=device)
    engine_times = watch_engine()
    with (
        Mapped(shared[0], shared[1], device) as memory,
        wt.WeightReceiver(config, weights) as receiver,
        wt.WeightReceiver(config, weights) as other,
        wt.serve(other) as server,
    ):
        source = memory[shared[2] : shared[2] + LIMIT]
        pipe.send_bytes(server.url.encode())
        while (command := pipe.recv_bytes()) != b"stop":
            if command == b"limit":
                torch.cuda.synchronize(device)
                since = time.perf_counter()
                for start in range(0, total, LIMIT):
                    size = min(LIMIT, total - start)
                    target[:size].copy_(source[:size])
                torch.cuda.synchronize(device)
                pipe.send_bytes(json.dumps(time.perf_counter() - since).encode())
            elif command == b"packed":
                receive_packed(pipe, weights, device)
            elif command == b"unpacked":
                receive_unpacked(pipe, weights, device)
            elif command == b"digest":
                pipe.send_bytes(digest(weights).encode())
            elif command == b"extra":
                joined = receiver._joined  # noqa: SLF001  (no public way to ask a worker)
                pipe.send_bytes(json.dumps(joined.engine.extra_memory if joined else 0).encode())
            elif command == b"engine":
                pipe.send_bytes(json.dumps(engine_times[-1]).encode())
            elif command == b"forget":
                for parameter in weights.parameters():
                    parameter.data.zero_()
                torch.cuda.synchronize(device)
                pipe.send_bytes(b"1")
            else:
                answer(pipe, receiver, command)
        del source


def measure(case: str, peer: bool, rounds: int, config: dict[str, Any]) -> None:
    """Run one case and print its table."""
    devices = ("cuda:0", "cuda:1" if peer else "cuda:0")
    torch.cuda.set_device(0)
    weights = shapes.Weights(CASES[case](), torch.bfloat16, devices[0])
    nbytes = sum(parameter.nbytes for parameter in weights.parameters())
    source = torch.ones(LIMIT, dtype=torch.uint8, device=devices[0])
    buffer = torch.empty(2 * GIB, dtype=torch.uint8, device=devices[0])
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, case, devices[1], config, where(source)), daemon=True)
    process.start()

    def ask(command: str) -> str:
        pipe.send_bytes(command.encode())
        return pipe.recv_bytes().decode()

    url = pipe.recv_bytes().decode()
    times: dict[str, list[float]] = {}

    def note(scheme: str, seconds: float) -> None:
        times.setdefault(scheme, []).append(seconds)

    def timed(scheme: str, call: Callable[[], object]) -> Any:
        since = time.perf_counter()
        result = call()
        note(scheme, time.perf_counter() - since)
        return result

    def packed() -> None:
        pipe.send_bytes(b"packed")
        send_packed(pipe, weights, buffer)

    def unpacked() -> None:
        pipe.send_bytes(b"unpacked")
        send_unpacked(pipe, weights)

    with wt.WeightSender(config, [PipeChannel(pipe)]) as by_pipe, wt.WeightSender(config, [url]) as by_http:
        senders = {"ours over a pipe": by_pipe, "ours over HTTP": by_http}
        schemes: dict[str, Callable[[], object]] = {
            **{name: partial(sender.send, weights, allow_rollback=True) for name, sender in senders.items()},
            "packed": packed,
            "unpacked": unpacked,
        }
        weights.randomise(0)
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info(devices[1])[0]
        for seed, scheme in enumerate([*schemes, "ours over a pipe"]):
            weights.randomise(1 + seed % 4)
            ask("forget")
            schemes[scheme]()
            if scheme == "ours over a pipe" and not seed:  # before the digests below take memory of their own
                taken = free - torch.cuda.mem_get_info(devices[1])[0]
            if ask("digest") != digest(weights):
                raise SystemExit(f"{case}: {scheme}: the worker's bytes differ from the trainer's")
            if scheme == "ours over a pipe" and not seed:
                extra = [by_pipe.send(weights, allow_rollback=True).extra_memory, json.loads(ask("extra"))]
        for _ in range(rounds + 1):
            note("limit", json.loads(ask("limit")))
            for name in senders:
                report = timed(name, schemes[name])
                note(f"{name}, update", report.seconds["update"])
                note(f"{name}, engine", json.loads(ask("engine")))
        for _ in range(4):
            for name in ("packed", "unpacked"):
                timed(name, schemes[name])
    pipe.send_bytes(b"stop")
    process.join(30)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"{case}: {report.params} tensors, {nbytes / 1e9:.2f} GB, {' -> '.join(devices)}, bits equal in every scheme")
    print(
        f"  extra device memory: trainer {extra[0] / 2**20:.1f} MiB, worker {extra[1] / 2**20:.1f} MiB; "
        f"taken from the worker's GPU by the first update, kernels included: {taken / 2**20:.1f} MiB"
    )
    for name, seconds in medians.items():
        rate, ratio = nbytes / seconds / 1e9, medians["limit"] / seconds
        print(f"  {name:24} {seconds * 1e3:9.2f} ms {rate:9.1f} GB/s   ratio {ratio:6.3f}", flush=True)
