"""What ``benchmarks/ipc.py`` compares with on GPUs: vLLM's schemes, written afresh from their description."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.bench.schemes import Scheme
from weight_transfer.limit import timed
from weight_transfer_ipc import cuda
from weight_transfer_ipc.connection import credentials, is_trusted
from weight_transfer_ipc.device_memory import bytes_at

if TYPE_CHECKING:
    from weight_transfer.bench.schemes import SchemeSide

GIB = 2**30
LONG = 120.0  # seconds that a side waits for the other one at most
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


class Line:
    """Brings JSON from one side to the other, a text a line; raises `TimeoutError` when the other one stands still."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(LONG)
        if not is_trusted(credentials(sock)[1]):
            raise PermissionError("another user has the other end of the socket")
        self._file = sock.makefile("rwb")

    def say(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def hear(self) -> Any:
        said = self._file.readline()
        if not said.endswith(b"\n"):
            raise EOFError("the other side has ended")
        return json.loads(said)

    def close(self) -> None:
        self._file.close()


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


def receive_packed(line: Line, weights: Weights, device: torch.device) -> None:
    for chunk in split(weights):
        handle, nbytes, offset = line.hear()
        with Mapped(handle, nbytes, device) as memory:
            sizes = [tensor.nbytes for tensor in chunk]
            for tensor, part in zip(chunk, memory[offset : offset + sum(sizes)].split(sizes), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            torch.cuda.synchronize(device)
        line.say("copied")


def send_packed(line: Line, weights: Weights, buffer: torch.Tensor) -> None:
    for chunk in split(weights):
        parts = [tensor.view(-1).view(torch.uint8) for tensor in chunk]
        torch.cat(parts, out=buffer[: sum(part.numel() for part in parts)])
        torch.cuda.synchronize()
        line.say(where(buffer))
        line.hear()


def receive_unpacked(line: Line, weights: Weights, device: torch.device) -> None:
    for weight, (handle, nbytes, offset) in zip(weights, line.hear(), strict=True):
        with Mapped(handle, nbytes, device) as memory:
            part = memory[offset : offset + weight.nbytes]
            weight.copy_(part.view(weight.dtype).view(weight.shape))
            del part, memory
    torch.cuda.synchronize(device)
    line.say("copied")


def send_unpacked(line: Line, weights: Weights) -> None:
    line.say([where(weight) for weight in weights])
    line.hear()


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(LONG)
    return made


class Shared(Scheme):
    """The trainer and its only worker tell each other, over a socket, where memory lies and that it was copied."""

    side: SchemeSide

    def offer(self) -> Any:
        address = f"weight-transfer-scheme-{secrets.token_hex(16)}"
        self._socket = _socket()
        self._socket.bind("\0" + address)
        self._socket.listen(1)
        return address

    def join(self, offers: Sequence[Any]) -> None:
        if self.side.is_trainer:
            with self._socket as listener:
                self._socket, _ = listener.accept()
        else:
            self._socket = _socket()
            self._socket.connect("\0" + offers[0])
        self._line = Line(self._socket)

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
        self._line.close()
        self._socket.close()


class Packed(Shared):
    """Buffers of 1 GiB: concatenate, share the handle, map, split, copy, unmap, answer."""

    what = "buffers of 1 GiB into which weights were packed"

    def offer(self) -> Any:
        self._buffer = torch.empty(2 * GIB, dtype=torch.uint8, device=self.side.device)
        return super().offer()

    def give(self, weights: Weights) -> None:
        send_packed(self._line, weights, self._buffer)

    def take(self, weights: Weights) -> None:
        receive_packed(self._line, weights, self.side.device)


class Unpacked(Shared):
    """A handle for each weight, shared, mapped and unmapped at each update, and a copy for each."""

    what = "a handle and a copy for each weight"

    def give(self, weights: Weights) -> None:
        send_unpacked(self._line, weights)

    def take(self, weights: Weights) -> None:
        receive_unpacked(self._line, weights, self.side.device)
