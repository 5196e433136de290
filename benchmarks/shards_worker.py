"""The workers of ``benchmarks/shards.py``: those of ``weight-transfer bench``, which may copy piece by piece, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.bench import worker
from weight_transfer.bench.member import Scene
from weight_transfer.limit import timed

if TYPE_CHECKING:
    from weight_transfer.limit import Seconds
    from weight_transfer.testing.actors import Stage


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    Worker(Scene.of(scene), number).perform(stage)


class Worker(worker.Worker):
    """A worker whose model holds its part of each weight."""

    def __init__(self, scene: Scene, number: int) -> None:
        super().__init__(scene, number)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied: dict[tuple[int, str], torch.Tensor] = {}

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

    def map(self, shared: Sequence[dict[str, Any]]) -> None:
        """Map the trainer ranks' shards, for plain copies on a GPU; see `Trainer.where`."""
        from weight_transfer_ipc import cuda
        from weight_transfer_ipc.device_memory import bytes_at

        memory: list[list[torch.Tensor]] = []
        for rank in shared:
            memory.append([])
            for handle, nbytes in rank["allocations"]:
                address = cuda.open_handle(handle, self.device.index)
                self.stack.callback(cuda.close_handle, address, self.device.index)
                memory[-1].append(bytes_at(address, nbytes, self.device))

        def shard(rank: int, name: str) -> torch.Tensor:
            number, offset = shared[rank]["places"][name]
            held = self.parts.held(name, rank)
            data: torch.Tensor = memory[rank][number][offset : offset + 2 * held.volume]
            return data.view(torch.bfloat16).view(held.shape)

        self._pair(shard)

    def copy_plainly(self) -> Seconds:
        """Copy each piece by itself."""

        def copy() -> None:
            for target, source in self._pairs:
                target.copy_(source)

        return timed(copy, self.device)

    def unpair(self) -> None:
        """Let go of what plain copies read."""
        self._pairs, self._copied = [], {}

    def _pair(self, shard: Callable[[int, str], torch.Tensor]) -> None:
        """Pair each piece with its place, as integers, since copies of floats may change the bits of NaNs on a GPU."""
        targets = self.weights()
        self._pairs = [
            (
                targets[piece.name].view(torch.int16)[piece.target],
                shard(piece.rank, piece.name).view(torch.int16)[piece.source],
            )
            for piece in self.parts.pieces(self.number)
        ]
