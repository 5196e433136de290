"""What trainer ranks and workers of ``benchmarks/shards.py`` have in common: who takes part, memory, and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import limits
import torch
from parts import Parts


@attrs.frozen(kw_only=True)
class Scene:
    """Who takes part.

    Attributes:
        parts: what lies where.
        backend: the backend's name.
        config: for both sides.
        trainers: devices of the trainer's ranks.
        workers: devices of the workers.
        store: file in which the trainer's ranks meet.
    """

    parts: Parts
    backend: str
    config: dict[str, Any]
    trainers: Sequence[str]
    workers: Sequence[str]
    store: str


class Member:
    """A process of the benchmark.

    Args:
        scene: who takes part.
        device: of this one's weights.
        sizes: see `limits.Limit`.
    """

    def __init__(self, scene: Scene, device: str, sizes: Sequence[int]) -> None:
        self.scene, self.parts = scene, scene.parts
        self.device = torch.device(device)
        self.sizes = sizes
        self.stack = ExitStack()
        self.limit: limits.Limit | None = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)

    def tidy(self) -> None:
        """Be there, and give the GPU back what torch keeps for later."""
        limits.settle(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def before(self) -> None:
        """Take note of the memory that is held now, when all processes are tidy."""
        self._held = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
            self._free = torch.cuda.mem_get_info(self.device)[0]

    def memory(self) -> dict[str, int]:
        """Return bytes beyond those that were held `before`: the engine's own count, torch's peak, and the whole GPU's.

        The last one counts all processes on this GPU, with kernels that were loaded and what torch keeps for later.
        """
        found = {"engine": self.engine_memory()}
        if self.device.type == "cuda":
            found["torch_peak"] = torch.cuda.max_memory_allocated(self.device) - self._held
            found["gpu"] = self._free - torch.cuda.mem_get_info(self.device)[0]
        return found

    def engine_memory(self) -> int:
        raise NotImplementedError

    def make_limit(self, member: int, meeting: Any) -> Any:
        """Make this side of the limit; return what the others need of it."""
        common = self.device, self.sizes, list(map(torch.device, self.scene.trainers))
        if self.scene.backend == "nccl":
            self.limit = limits.GroupLimit(*common, member=member, meeting=meeting)
        elif self.scene.backend == "rdma":
            self.limit = limits.ReadLimit(*common, name=str(member), config=self.scene.config)
        elif member < len(self.scene.trainers):  # only the workers copy
            self.limit = limits.Limit(*common)
        else:
            self.limit = (limits.SideBySideLimit if self.device.type == "cuda" else limits.CopyLimit)(*common)
        return self.limit.offer() if member < len(self.scene.trainers) else None

    def join_limit(self, offers: Sequence[Any]) -> None:
        assert self.limit is not None
        self.limit.join(offers)

    def run_limit(self) -> limits.Seconds:
        assert self.limit is not None
        return self.limit.run()

    def end_limit(self) -> None:
        if self.limit is not None:
            self.limit.close()
            self.limit = None

    def close(self) -> None:
        self.end_limit()
        self.stack.close()
