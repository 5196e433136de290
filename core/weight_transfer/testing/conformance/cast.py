"""The actors of one test of the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import torch

from weight_transfer.control import line_server
from weight_transfer.control.kept_threads import KeptThreads
from weight_transfer.session import calls
from weight_transfer.testing.actors import PATIENCE, Actor
from weight_transfer.testing.models import Weight, weight

if TYPE_CHECKING:
    import pytest

    from weight_transfer.errors import WeightTransferError


T = TypeVar("T")
_MOMENT = 1.0  # seconds; who pulls pays them in full

PLAIN: list[Weight] = [
    weight("embed", "float32", 300, 256),
    *(weight(f"layer{i}_weight", "bfloat16", 128, 128) for i in range(6)),
    *(weight(f"layer{i}_bias", "float32", 128) for i in range(6)),
]
"""Half a megabyte: several buckets, a weight that spans some of them, and several weights of one shape."""

LARGE: list[Weight] = [weight(f"w{index}", "float32", 512, 512) for index in range(64)]
"""64 MiB, of which no weight has more than one: what a test does with a weight itself is small beside all of them."""


def plays(*, ranks: int = 1, workers: int = 1) -> Callable[[T], T]:
    """Mark a test that has other numbers of trainer ranks and of workers than one each."""

    def mark(test: T) -> T:
        test.cast_size = (ranks, workers)  # type: ignore[attr-defined]  # functions take attributes
        return test

    return mark


def cast_size(item: pytest.Item) -> tuple[int, int]:
    """Return the numbers of trainer ranks and of workers that a test has: its own parameters say, or `plays`."""
    ranks, workers = getattr(getattr(item, "function", None), "cast_size", (1, 1))
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return given.get("size", ranks), next(
        (given[name] for name in ("count", "most", "workers") if name in given), workers
    )


class Member:
    """A worker or a trainer on the stage: an actor, and the name of its session there."""

    def __init__(self, actor: Actor, name: str, url: str = "") -> None:
        self.actor = actor
        self.url = url
        self._name = name
        self.kill = actor.kill

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return its reply."""
        return self.actor.ask(command, name=self._name, **arguments)

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its reply."""
        self.actor.tell(command, name=self._name, **arguments)

    def reply(self, within: float = PATIENCE) -> Any:
        """Wait for a reply."""
        return self.actor.reply(within)

    def error(self, within: float = PATIENCE) -> WeightTransferError:
        """Wait for a reply, which must be an error."""
        return self.actor.error(within)

    def await_update(self) -> None:
        """Wait a moment until a worker is told of the update; a backend may prepare it before."""
        self.ask("await_update", seconds=_MOMENT)

    def stopped(self) -> AbstractContextManager[None]:
        """Freeze its process inside a ``with`` block."""
        return self.actor.stopped()

    @property
    def port(self) -> int:
        """The TCP port of a worker's control channel."""
        return int(self.url.rpartition(":")[2])


class Cast:
    """Starts the actors of one test and ends them with it.

    Args:
        config: of every member.
        device: the torch device of the member with a rank; the trainer has rank 0.
        in_process: whether actors are threads.
    """

    def __init__(self, config: dict[str, Any], device: Callable[[int], str], in_process: bool) -> None:
        self._config = config
        self._device = device
        self.in_process = in_process
        self._end = ExitStack()
        self._actors: list[Actor] = []
        self._names = 0
        if in_process:
            self._have_no_teams()

    def worker(
        self,
        weights: Sequence[Weight] = PLAIN,
        *,
        rank: int = 1,
        beside: Member | None = None,
        config: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Member:
        """Start a worker, in a process of its own or ``beside`` another one; ``spec`` is that of `testing.worker`."""
        actor = beside.actor if beside else self._start("worker")
        name = self._name()
        spec = {"seed": 100 + rank, "device": self._device(rank), "config": self._config | dict(config or {})} | spec
        url = actor.ask("open", name=name, weights=weights, **spec)
        return Member(actor, name, url)

    def workers(self, count: int, weights: Sequence[Weight] = PLAIN, **spec: Any) -> list[Member]:
        """Start several workers."""
        return [self.worker(weights, rank=rank, **spec) for rank in range(1, count + 1)]

    def trainer(
        self,
        workers: Sequence[Member],
        weights: Sequence[Weight] = PLAIN,
        *,
        beside: Member | None = None,
        config: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Member:
        """Start a trainer that sends to ``workers``; ``spec`` is that of `testing.trainer`."""
        actor = beside.actor if beside else self._start("trainer")
        name = self._name()
        spec = {"device": self._device(0), "config": self._config | dict(config or {})} | spec
        actor.ask("open", name=name, workers=[worker.url for worker in workers], weights=weights, **spec)
        return Member(actor, name)

    def inviter(self) -> Member:
        """Start a trainer's engine that nobody drives, which invites one worker."""
        name = self._name()
        actor = self._start("inviter")
        actor.ask("open", name=name, config=self._config, device=self._device(0))
        return Member(actor, name)

    def end(self) -> None:
        """End all actors."""
        for actor in self._actors:
            actor.hang_up()
        for actor in self._actors:
            actor.stop()
        self._end.close()

    def _have_no_teams(self) -> None:
        """Let no thread compute with others: OpenMP would give each one a team of its own.

        A thread knows how large its team is from the first time that torch asks on it. Calls are therefore made by
        other threads than those that may be left of an earlier session of this process.
        """
        self._end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for module, name in ((calls, "_threads"), (line_server, "THREADS")):
            new = KeptThreads(getattr(module, name).name)
            self._end.enter_context(mock.patch.object(module, name, new))

    def _start(self, role: str) -> Actor:
        threads = None if self.in_process else 1
        actor = Actor(f"weight_transfer.testing.{role}", in_process=self.in_process, threads=threads)
        self._actors.append(actor)
        return actor.ready()

    def _name(self) -> str:
        self._names += 1
        return f"session {self._names}"
