"""Actors that the tests place on a cluster, and models whose bits are compared."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

import weight_transfer as wt
from weight_transfer_ray import Place, RayWorker, ray_worker


def make_model(seed: int, width: int = 64) -> torch.nn.Module:
    """Return a model of random bit patterns, NaNs among them."""
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 16, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        raw = parameter.data.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
    return model


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: bytes(p.detach().contiguous().view(torch.uint8).numpy()) for name, p in model.named_parameters()}


class Serving(RayWorker):
    """Serves a model; its default group has one thread, which `hold` keeps busy."""

    def __init__(self, config: dict[str, Any], width: int = 64, place: dict[str, int] | None = None) -> None:
        self.model = make_model(0, width)
        self.loading, self.leave = threading.Event(), threading.Event()
        self.trouble = ""
        parallel = wt.ParallelConfig(**place or {})
        self.receive_weights(config, self.model, load_weights=self._load, parallel_config=parallel)

    def _load(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].data.view(torch.uint8).copy_(tensor.view(torch.uint8))
        self.loading.set()
        if self.trouble == "slow":
            self.leave.wait(60)
        elif self.trouble == "broken":
            raise RuntimeError("this loader is broken")

    def make_trouble(self, trouble: str) -> None:
        """Have the loader be ``"slow"`` or ``"broken"``; a restarted actor is neither."""
        self.loading.clear()
        self.trouble = trouble

    def await_loading(self) -> bool:
        return self.loading.wait(30)

    def state(self) -> str:
        return str(self.receiver.state)

    def bits(self) -> tuple[int | str | None, dict[str, bytes]]:
        return self.receiver.version, bits(self.model)

    def hold(self) -> int | str | None:
        """Be busy until told otherwise, without sampling."""
        self.leave.wait(60)
        self.leave.clear()
        return self.receiver.version

    def let_go(self) -> None:
        self.leave.set()

    def pid(self) -> int:
        return os.getpid()


class AsyncServing(Serving):
    """The same on an event loop, as servers of language models are."""

    async def sample(self) -> int | str:
        async with self.receiver.aserving(30) as version:
            return version


Worker = ray_worker(num_cpus=0)(Serving)
Restarting = ray_worker(num_cpus=0, max_restarts=-1)(Serving)
AsyncWorker = ray_worker(num_cpus=0)(AsyncServing)


ROWS, COLUMNS = 64, 32


def make_weight(seed: int) -> torch.Tensor:
    raw = torch.randint(0, 256, (ROWS, COLUMNS, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(torch.float32).view(ROWS, COLUMNS)


class Trainer:
    """A rank that holds some of the columns of one weight."""

    def __init__(self, place: Place, config: dict[str, Any], workers: Sequence[Any]) -> None:
        self.rank, part = place.rank, COLUMNS // place.world_size
        self.columns = slice(place.rank * part, (place.rank + 1) * part)
        self.own = torch.zeros(ROWS, part)
        self.source = wt.ShardedSource(lambda: [("weight", (ROWS, COLUMNS), (0, self.columns.start), self.own)])
        self.sender = place.sender(config, workers)
        self.place = place

    def take(self, seed: int) -> None:
        self.own.view(torch.int32).copy_(make_weight(seed)[:, self.columns].view(torch.int32))

    def send(self) -> tuple[int, ...]:
        return self.sender.send(self.source).given

    def gather(self) -> int:
        """Show that torch.distributed works among the ranks."""
        self.place.init_process_group("gloo")
        found = torch.tensor(self.rank)
        torch.distributed.all_reduce(found)
        return int(found)

    def end(self, rank: int) -> None:
        if self.rank == rank:
            os._exit(1)

    def fail(self, rank: int) -> None:
        if self.rank == rank:
            raise ValueError("this rank fails")


class Keeping(RayWorker):
    """A worker that keeps some of the rows of that weight."""

    def __init__(self, config: dict[str, Any], number: int) -> None:
        rows = wt.Region.split((ROWS, COLUMNS), 0, number, 2)
        self.model = torch.nn.Module()
        self.model.part = torch.nn.Parameter(torch.zeros(ROWS // 2, COLUMNS))
        self.receive_weights(config, self.model, needs=lambda _: {"weight": wt.Target(rows, self.model.part)})

    def raw(self) -> bytes:
        return bytes(self.model.part.detach().view(torch.uint8).numpy())


Keeper = ray_worker(num_cpus=0)(Keeping)
