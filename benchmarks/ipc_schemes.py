"""What ``benchmarks/ipc.py`` compares with on GPUs: vLLM's schemes, written afresh from their description."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Client, Listener
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.bench.schemes import Scheme
from weight_transfer.limit import timed
from weight_transfer_ipc import cuda
from weight_transfer_ipc.device_memory import bytes_at

if TYPE_CHECKING:
    from weight_transfer.bench.schemes import SchemeSide

GIB = 2**30
AnyConnection = Any
"""Of `multiprocessing.connection`, between the trainer and the worker."""
Weights = Sequence[torch.Tensor]


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


def split(weights: Weights) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    total = 0
    for weight in weights:
        if chunk and total + weight.nbytes > GIB:
            yield chunk
            chunk, total = [], 0
        chunk.append(weight)
        total += weight.nbytes
    yield chunk


def receive_packed(pipe: AnyConnection, weights: Weights, device: torch.device) -> None:
    for chunk in split(weights):
        handle, nbytes, offset = json.loads(pipe.recv_bytes())
        with Mapped(handle, nbytes, device) as memory:
            sizes = [tensor.nbytes for tensor in chunk]
            for tensor, part in zip(chunk, memory[offset : offset + sum(sizes)].split(sizes), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            torch.cuda.synchronize(device)
        pipe.send_bytes(b"1")


def send_packed(pipe: AnyConnection, weights: Weights, buffer: torch.Tensor) -> None:
    for chunk in split(weights):
        parts = [tensor.view(-1).view(torch.uint8) for tensor in chunk]
        torch.cat(parts, out=buffer[: sum(part.numel() for part in parts)])
        torch.cuda.synchronize()
        pipe.send_bytes(json.dumps(where(buffer)).encode())
        pipe.recv_bytes()


def receive_unpacked(pipe: AnyConnection, weights: Weights, device: torch.device) -> None:
    for weight, (handle, nbytes, offset) in zip(weights, json.loads(pipe.recv_bytes()), strict=True):
        with Mapped(handle, nbytes, device) as memory:
            part = memory[offset : offset + weight.nbytes]
            weight.copy_(part.view(weight.dtype).view(weight.shape))
            del part, memory
    torch.cuda.synchronize(device)
    pipe.send_bytes(b"1")


def send_unpacked(pipe: AnyConnection, weights: Weights) -> None:
    pipe.send_bytes(json.dumps([where(weight) for weight in weights]).encode())
    pipe.recv_bytes()


class Shared(Scheme):
    """The trainer and its only worker tell each other, over a socket, where memory lies and that it was copied."""

    side: SchemeSide

    def offer(self) -> Any:
        key = secrets.token_bytes()
        self._listener = Listener(family="AF_UNIX", authkey=key)
        return {"address": self._listener.address, "key": key.hex()}

    def join(self, offers: Sequence[Any]) -> None:
        if self.side.is_trainer:
            self._pipe = self._listener.accept()
            self._listener.close()
        else:
            self._pipe = Client(offers[0]["address"], authkey=bytes.fromhex(offers[0]["key"]))

    def run(self) -> tuple[float, float]:
        weights = list(self.side.process.weights().values())
        move = self.give if self.side.is_trainer else self.take
        return timed(partial(move, weights), self.side.device)

    def give(self, weights: Weights) -> None:
        """Send, on the trainer."""
        raise NotImplementedError

    def take(self, weights: Weights) -> None:
        """Receive, on the worker."""
        raise NotImplementedError

    def close(self) -> None:
        self._pipe.close()


class Packed(Shared):
    """Buffers of 1 GiB: concatenate, share the handle, map, split, copy, unmap, answer."""

    what = "buffers of 1 GiB into which weights were packed"

    def offer(self) -> Any:
        self._buffer = torch.empty(2 * GIB, dtype=torch.uint8, device=self.side.device)
        return super().offer()

    def give(self, weights: Weights) -> None:
        send_packed(self._pipe, weights, self._buffer)

    def take(self, weights: Weights) -> None:
        receive_packed(self._pipe, weights, self.side.device)


class Unpacked(Shared):
    """A handle for each weight, shared, mapped and unmapped at each update, and a copy for each."""

    what = "a handle and a copy for each weight"

    def give(self, weights: Weights) -> None:
        send_unpacked(self._pipe, weights)

    def take(self, weights: Weights) -> None:
        receive_unpacked(self._pipe, weights, self.side.device)
