"""The processes of a scene, and what they do together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
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

ROLES = ("weight_transfer.bench.trainer", "weight_transfer.bench.worker")
"""The modules of the processes that a benchmark starts, unless it has further commands for them."""

_COMPARED = 100e6  # bytes of bits that are made and compared in a second, at the least
_START = 120.0  # seconds in which processes import torch and allocate


class Troupe:
    """Trainer ranks and workers, as processes; use it as a context manager.

    Args:
        scene: who takes part; the file in which ranks meet is made here.
        patience: seconds that one step may take, after the start, beside those in which bits are made and compared.
        roles: modules of the trainer ranks' and of the workers' processes.

    Raises:
        AssertionError: a process has died or does not answer; from all methods.
        WeightTransferError: something failed in one.
    """

    def __init__(self, scene: Scene, patience: float, roles: tuple[str, str] = ROLES) -> None:
        self.scene = scene
        self.patience = patience + scene.parts.nbytes / _COMPARED
        self._roles = roles
        self.trainers: list[Actor] = []
        self.workers: list[Actor] = []

    def __enter__(self) -> Self:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for them: threads that spin longer crawl on a busy machine
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            spec = attrs.evolve(self.scene, store=str(Path(folder) / "store")).to_dict()
            stack.callback(self._end)
            for role, actors, devices, name in (
                (self._roles[0], self.trainers, self.scene.trainers, "trainer"),
                (self._roles[1], self.workers, self.scene.workers, "worker"),
            ):
                for number in range(len(devices)):
                    called = f"{name} {number}"
                    actors.append(Actor(role, shielded=True, called=called, scene=spec, number=number))
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
        """Have the workers serve, and the trainer's ranks make senders to them, one for each way."""
        served = self.ask(self.workers, "serve")
        urls = {way: [each[way] for each in served] for way in self.scene.ways}
        self.ask(self.trainers, "connect", urls=urls)

    def send(self, way: str) -> dict[str, Any]:
        """Send in one of the ways; return what rank 0 tells of it."""
        told: dict[str, Any] = self.ask(self.trainers, "send", way=way)[0]  # the other ranks have the same report
        return told

    def require_bits(self, version: int) -> None:
        """Compare every element of every worker with that of a version.

        Raises:
            TransferError: there are others.
        """
        wrong = self.ask(self.workers, "wrong", seed=version)
        if any(wrong):
            raise TransferError(f"Workers hold {wrong} elements that are not those of version {version}.")

    def bring(self, version: int, move: Callable[[], object]) -> dict[str, dict[str, int]]:
        """Fill the trainer with a version, have it moved to workers whose weights are zero, and compare all bits.

        Returns:
            What was beyond that in the memory of each process, see `Member.memory`.
        """
        self.ask(self.trainers, "fill", seed=version)
        self.ask(self.workers, "forget")
        self.ask(self.everyone, "tidy")
        self.ask(self.everyone, "before")
        move()
        memory = self.ask(self.everyone, "memory")
        self.require_bits(version)
        return dict(zip([actor.called for actor in self.everyone], memory, strict=True))

    def open_limit(self, scheme: str | None = None) -> tuple[str, bool]:
        """Get everybody ready for the limit, or for a scheme.

        Returns:
            What is moved, in words, and whether it is the weights.
        """
        offers = self.ask(self.everyone, "make_limit", scheme=scheme)[: len(self.trainers)]
        what, brings = self.ask(self.everyone, "join_limit", scheme=scheme, offers=offers)[-1]
        return what, brings

    def run_limit(self, scheme: str | None = None) -> Seconds:
        """Move all bytes once; return what the slowest side took: wall time, and CPU time."""
        return slowest(self.ask(self.everyone, "run_limit", scheme=scheme))

    def close_limits(self) -> None:
        """Give back what the limit and all schemes hold."""
        self.ask(self.everyone, "end_limits")


def slowest(taken: Iterable[Seconds]) -> Seconds:
    """Return the longest wall time, and the most CPU time, of some processes that did something together."""
    walls, cpu = zip(*taken, strict=True)
    return max(walls), max(cpu)
