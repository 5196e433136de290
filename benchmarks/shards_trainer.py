"""The trainer ranks of ``benchmarks/shards.py``: those of ``weight-transfer bench``, which may gather and be mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import weight_transfer as wt
from weight_transfer.bench import trainer
from weight_transfer.bench.member import Scene

if TYPE_CHECKING:
    from weight_transfer.model.shards import Shard
    from weight_transfer.testing.actors import Stage

NO_SHARDS: Mapping[str, Sequence[Shard]] = {}


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    Trainer(Scene.of(scene), number).perform(stage)


class Gathered(wt.ModuleSource):
    """Weights of which nobody says where their shards lie, so that they are gathered: what every backend did once."""

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        return NO_SHARDS


class Trainer(trainer.Trainer):
    """A trainer rank."""

    @cached_property
    def _gathered(self) -> Gathered:
        return Gathered(self.model)

    def gather(self) -> dict[str, Any]:
        """Send what is gathered; as `send`."""
        return self._send("send", self._gathered)

    def where(self) -> dict[str, Any]:
        """Return handles and bytes of this rank's GPU allocations; and by name in which one a shard lies, and where."""
        from weight_transfer_ipc import cuda

        numbers: dict[int, int] = {}
        allocations: list[tuple[str, int]] = []
        places: dict[str, tuple[int, int]] = {}
        for name, tensor in self.weights().items():
            index, address = self.device.index, tensor.data_ptr()
            if not tensor.numel():
                continue
            begin, nbytes = cuda.allocation_at(address, index)
            if begin not in numbers:
                numbers[begin] = len(allocations)
                allocations.append((cuda.export(begin, index), nbytes))
            places[name] = numbers[begin], address - begin
        return {"allocations": allocations, "places": places}
