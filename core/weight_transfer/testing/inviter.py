"""The actor that plays a trainer of which nothing but the engine is there: it invites one worker, and lets it in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.config.settings import ParallelConfig
from weight_transfer.config.structuring import structure, unstructure
from weight_transfer.engine import WorkerSlot
from weight_transfer.plugins.manager import load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.engine import TrainerWeightTransferEngine
    from weight_transfer.testing.actors import Stage

_SLOT = WorkerSlot(peer="the worker", rank_offset=1, count=1, world_size=2)
_OPENING = 30.0  # seconds: an engine may have to start a process, on a machine that is busy


class Inviter:
    """One engine."""

    def __init__(self, config: dict[str, Any], device: str = "cpu") -> None:
        settings = load_config(config)
        self._engine: TrainerWeightTransferEngine[Any, Any] = load_backend(settings.backend).create_trainer_engine(
            settings, ParallelConfig(device=device)
        )

    def invite(self, timeout: float) -> Any:
        """Open the endpoint, and return what a worker is sent in order to join within ``timeout`` seconds."""
        [fields] = self._engine.open_endpoint([_SLOT], Deadline(_OPENING))
        common = {"rank_offset": _SLOT.rank_offset, "world_size": _SLOT.world_size, "timeout": timeout}
        return unstructure(structure({**fields, **common}, self._engine.init_info_cls, "init_info"))

    def admit(self, timeout: float) -> None:
        """Wait until the worker has joined."""
        self._engine.join_workers(Deadline(timeout))

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.shutdown()


def main(stage: Stage, threads: int | None = None) -> None:
    """Serve commands; each names the engine that it is about."""
    if threads is not None:
        torch.set_num_threads(threads)
    inviters: dict[str, Inviter] = {}

    def open_(name: str, **spec: Any) -> None:
        inviters[name] = Inviter(**spec)

    stage.say("ready")
    stage.serve(
        {
            "open": open_,
            "invite": lambda name, timeout: inviters[name].invite(timeout),
            "admit": lambda name, timeout: inviters[name].admit(timeout),
        }
    )
    for inviter in inviters.values():
        inviter.close()
