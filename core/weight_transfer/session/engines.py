"""The trainer's engines, of rank 0 and of its other ranks, as rank 0 sees them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import unstructure
from weight_transfer.plugins.backend import Capability

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.engine import TrainerWeightTransferEngine, WorkerSlot
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.crew import Crew
    from weight_transfer.values.deadline import Deadline


class Engines:
    """One engine on each trainer rank, if the backend moves regions; else rank 0's alone.

    Args:
        backend: the loaded backend.
        config: the trainer's.
        parallel_config: rank 0's.

    Attributes:
        own: rank 0's; None before the first join, and after `drop`.
        by_region: whether the backend moves regions.
        generation: of the present engines; another one for each time that they were made. The other ranks tell theirs.
    """

    def __init__(self, backend: LoadedBackend, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        self.own: TrainerWeightTransferEngine[Any, Any] | None = None
        self.generation = ""
        self.by_region = Capability.REGIONS in backend.backend.capabilities
        self._backend = backend
        self._config = config
        self._parallel_config = parallel_config
        self._device: str | None = None
        self._crew: Crew | None = None

    def serve_with(self, crew: Crew) -> bool:
        """Take the trainer's ranks; return whether the present engines were made for them."""
        alone = crew.size == 1 and (self._crew is None or self._crew.size == 1)
        same, self._crew = alone or crew is self._crew, crew
        return same

    def are_those_of(self, generations: Sequence[str | None]) -> bool:
        """Whether the other ranks still have the engines that belong to rank 0's, if there is one."""
        others = self._others
        return self.own is None or others is None or set(generations) == {self.generation}

    def place(self, device: str) -> bool:
        """Take where the weights lie; return whether the present engines were made for that."""
        if self._parallel_config.device is not None:
            return True
        same, self._device = self._device in (None, device), device
        return same

    @property
    def _others(self) -> Crew | None:
        """The other trainer ranks, if they have engines."""
        return self._crew if self.by_region and self._crew is not None and self._crew.size > 1 else None

    def open(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        """Get ready for workers; return what each must know of the engines: fields of its init info."""
        if self.own is None:
            if self._others is not None:
                self._others.ask("drop", "to shut their engines down", deadline)
            self.own, self.generation = self._create(), secrets.token_hex(4)
        fields = self.own.open_endpoint(slots, deadline)
        if self._others is None:
            return fields
        order = {"first": unstructure(fields[0]), "slots": list(map(unstructure, slots)), "generation": self.generation}
        answers = self._others.ask("open", "to get ready", deadline, **order)
        ranks = {"trainer_ranks": self._others.size, "ranks": [answer["fields"] for answer in answers]}
        return [{**own, **ranks} for own in fields]

    def join(self, deadline: Deadline) -> None:
        """Wait until the workers of the last `open` have joined every engine."""
        assert self.own is not None
        if self._others is not None:
            self._others.order("join", deadline)
        self.own.join_workers(deadline)
        if self._others is not None:
            self._others.answers("to be joined", deadline)

    def lose(self, peer: str) -> None:
        """Tell all of a worker that failed while the others go on."""
        if self.own is not None:
            self.own.lose_worker(peer)
        if self._others is not None:
            self._others.lose_worker(peer)

    def abort(self) -> None:
        """Make what all are doing raise soon; callable from any thread."""
        if self.own is not None:
            self.own.abort_update()
        if self._others is not None:
            self._others.abort()

    def drop(self) -> None:
        """Shut rank 0's down; the others follow when a new one is opened."""
        if self.own is not None:
            self.own.shutdown()
            self.own = None

    def _create(self) -> TrainerWeightTransferEngine[Any, Any]:
        parallel = attrs.evolve(self._parallel_config, device=self._parallel_config.device or self._device or "cpu")
        if self.by_region:
            size = self._others.size if self._others is not None else 1
            parallel = attrs.evolve(parallel, rank=0, world_size=size)
        return self._backend.create_trainer_engine(self._config, parallel)
