"""The workers of ``benchmarks/shards.py``, which keep a part of each weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import limits
import torch
from shards_member import Member, Scene
from torch import nn

import weight_transfer as wt


class Worker(Member):
    """A worker behind HTTP, whose model holds its part of each weight, declared with ``needs``."""

    def __init__(self, scene: Scene, number: int) -> None:
        super().__init__(scene, scene.workers[number], scene.parts.by_rank(number))
        self.number = number
        self.model = nn.Module()
        self._regions = {name: self.parts.kept(name, number) for name in self.parts.shapes}
        for name, region in self._regions.items():
            if region is not None:
                part = torch.zeros(region.shape, dtype=torch.bfloat16, device=self.device)
                self.model.register_parameter(_own(name), nn.Parameter(part, requires_grad=False))
        self._serving = ExitStack()
        self.stack.callback(self._serving.close)
        self._times: dict[str, limits.Seconds] = {}
        self._engine: Any = None
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied: dict[tuple[int, str], torch.Tensor] = {}
        self._watch_engine()

    def serve(self) -> str:
        """Serve a new receiver in place of the last one; return its address."""
        self._serving.close()
        receiver = self._serving.enter_context(wt.WeightReceiver(self.scene.config, self.model, needs=self._needs))
        return self._serving.enter_context(wt.serve(receiver)).url

    def engine_seconds(self) -> dict[str, limits.Seconds]:
        """Return wall time and the thread's CPU time of the engine's methods in the last update."""
        return self._times

    def forget(self) -> None:
        """Set all weights to zero."""
        for target in self._targets().values():
            target.zero_()
        limits.settle(self.device)

    def wrong(self, seed: int) -> int:
        """Count the elements that are not those of a version."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for name, target in self._targets().items():
            region = self._regions[name]
            assert region is not None
            count += self.parts.wrong(target, name, region, seed)
        return int(count)

    def hold(self) -> None:
        """Hold those shards here of which this worker takes something, for plain copies on the CPU; see `hold_seed`."""
        self._copied = {
            (piece.rank, piece.name): torch.zeros(self.parts.held(piece.name, piece.rank).shape, dtype=torch.bfloat16)
            for piece in self.parts.pieces(self.number)
        }
        self._pair(lambda rank, name: self._copied[rank, name])

    def hold_seed(self, seed: int) -> None:
        """Give them the weights of a version."""
        for (rank, name), tensor in self._copied.items():
            self.parts.fill(tensor, name, self.parts.held(name, rank), seed)

    def map(self, shared: Sequence[tuple[list[tuple[str, int]], dict[str, tuple[int, int]]]]) -> None:
        """Map the trainer ranks' shards, for plain copies on a GPU; see `Trainer.where`."""
        from weight_transfer_ipc import cuda
        from weight_transfer_ipc.device_memory import bytes_at

        memory: list[list[torch.Tensor]] = []
        for allocations, _ in shared:
            memory.append([])
            for handle, nbytes in allocations:
                address = cuda.open_handle(handle, self.device.index)
                self.stack.callback(cuda.close_handle, address, self.device.index)
                memory[-1].append(bytes_at(address, nbytes, self.device))

        def shard(rank: int, name: str) -> torch.Tensor:
            number, offset = shared[rank][1][name]
            held = self.parts.held(name, rank)
            data = memory[rank][number][offset : offset + 2 * held.volume]
            return data.view(torch.bfloat16).view(held.shape)

        self._pair(shard)

    def copy_plainly(self) -> limits.Seconds:
        """Copy each piece by itself."""

        def copy() -> None:
            for target, source in self._pairs:
                target.copy_(source)

        return limits.timed(copy, self.device)

    def unpair(self) -> None:
        """Let go of what plain copies read."""
        self._pairs, self._copied = [], {}

    def engine_memory(self) -> int:
        return int(self._engine.extra_memory) if self._engine is not None else 0

    def _targets(self) -> dict[str, torch.Tensor]:
        return {name: self._target(name) for name, region in self._regions.items() if region is not None}

    def _target(self, name: str) -> torch.Tensor:
        return self.model.get_parameter(_own(name)).detach()

    def _needs(self, manifest: wt.Manifest) -> dict[str, wt.Target | list[wt.Target]]:
        return {
            name: wt.Target(region, self._target(name)) if region is not None else []
            for name, region in self._regions.items()
        }

    def _pair(self, shard: Callable[[int, str], torch.Tensor]) -> None:
        """Pair each piece with its place, as integers, since copies of floats may change the bits of NaNs on a GPU."""
        targets = self._targets()
        self._pairs = [
            (
                targets[piece.name].view(torch.int16)[piece.target],
                shard(piece.rank, piece.name).view(torch.int16)[piece.source],
            )
            for piece in self.parts.pieces(self.number)
        ]

    def _watch_engine(self) -> None:
        """Time two methods of the worker's engine, in this process, until the GPU has done what they have begun."""
        config = wt.load_config(self.scene.config)
        parallel = wt.ParallelConfig(device=str(self.device))
        kind = type(wt.load_backend(self.scene.backend).create_worker_engine(config, parallel))
        for name in ("receive_regions", "receive_weights"):
            setattr(kind, name, self._timed(name, getattr(kind, name)))

    def _timed(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, *arguments: Any) -> None:
            since, cpu = time.perf_counter(), time.thread_time()
            method(engine, *arguments)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._times[name] = time.perf_counter() - since, time.thread_time() - cpu
            self._engine = engine

        return timed


def _own(name: str) -> str:
    """Return the name of a worker's part of a weight in its own model."""
    return name.replace(".", "/")
