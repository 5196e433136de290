"""The processes of a scene, and what they do together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs

from weight_transfer.errors import TransferError
from weight_transfer.testing.actors import Actor, ask_all

if TYPE_CHECKING:
    from weight_transfer.bench.member import Scene
    from weight_transfer.limit import Seconds

VERSIONS = (1, 2, 1)
"""That are sent before anything is timed: there and back, so that what arrives is never what was there."""

_START = 120.0  # seconds in which processes import torch and allocate


class Troupe:
    """Trainer ranks and workers, as processes; use it as a context manager.

    Args:
        scene: who takes part; the file in which ranks meet is made here.
        patience: seconds that one step may take, after the start.
        trainer: module of the trainer ranks' role.
        worker: module of the workers' role.

    Raises:
        AssertionError: a process has died or does not answer; from all methods.
        WeightTransferError: something failed in one.
    """

    def __init__(
        self,
        scene: Scene,
        patience: float,
        trainer: str = "weight_transfer.bench.trainer",
        worker: str = "weight_transfer.bench.worker",
    ) -> None:
        self.scene = scene
        self.patience = patience
        self._roles = trainer, worker
        self.trainers: list[Actor] = []
        self.workers: list[Actor] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            spec = attrs.evolve(self.scene, store=str(Path(folder) / "store")).to_dict()
            stack.callback(self._end)
            for role, actors, devices, name in (
                (self._roles[0], self.trainers, self.scene.trainers, "trainer"),
                (self._roles[1], self.workers, self.scene.workers, "worker"),
            ):
                for number in range(len(devices)):
                    actors.append(Actor(role, called=f"{name} {number}", scene=spec, number=number))
            ask_all(self.everyone, _START, "enter")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        for actor in self.everyone:
            actor.hang_up()
        for actor in self.everyone:
            actor.stop()

    @property
    def everyone(self) -> list[Actor]:
        """All of them; the trainer's ranks come first."""
        return [*self.trainers, *self.workers]

    def ask(self, actors: Sequence[Actor], command: str, **arguments: Any) -> list[Any]:
        """Have some do the same at the same time, and return their answers."""
        return ask_all(actors, self.patience, command, **arguments)

    def connect(self) -> None:
        """Have the workers serve, and the trainer's ranks make senders to them."""
        self.ask(self.trainers, "connect", urls=self.ask(self.workers, "serve"))

    def require_bits(self, version: int) -> None:
        """Compare every element of every worker with that of a version.

        Raises:
            TransferError: there are others.
        """
        wrong = self.ask(self.workers, "wrong", seed=version)
        if any(wrong):
            raise TransferError(f"Workers hold {wrong} elements that are not those of version {version}.")

    def bring(self, version: int) -> None:
        """Fill the trainer with a version, send it to workers whose weights are zero, and compare all bits."""
        self.ask(self.trainers, "fill", seed=version)
        self.ask(self.workers, "forget")
        self.ask(self.trainers, "send")
        self.require_bits(version)

    def open_limit(self) -> str:
        """Get everybody ready for the limit; return what it measures, in words."""
        offers = self.ask(self.everyone, "make_limit")[: len(self.trainers)]
        what: str = self.ask(self.everyone, "join_limit", offers=offers)[-1]
        return what

    def run_limit(self) -> list[Seconds]:
        """Move all bytes once; return what each one took."""
        return self.ask(self.everyone, "run_limit")

    def close_limit(self) -> None:
        """Give back what the limit holds."""
        self.ask(self.everyone, "end_limit")
