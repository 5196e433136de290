"""Trainers of several ranks, and workers, that the tests of a class use one after another: starting them takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch

from weight_transfer.errors import WeightTransferError
from weight_transfer.testing.actors import PATIENCE, Actor
from weight_transfer.testing.conformance.cast import Member
from weight_transfer.testing.keeping import KINDS
from weight_transfer.testing.shards import WEIGHTS

if TYPE_CHECKING:
    from weight_transfer.testing.models import Weight


Outcome = dict[str, Any] | WeightTransferError


class RegionTrainer:
    """A trainer of several ranks, in one test."""

    def __init__(self, ranks: Sequence[Member]) -> None:
        self.ranks = ranks

    def tell(self, seed: int, version: int, without: int | None = None) -> None:
        """Have all ranks send, or all but one."""
        for number, rank in enumerate(self.ranks):
            if number != without:
                rank.tell("send", seed=seed, version=version)

    def outcomes(self, within: float = PATIENCE, without: int | None = None) -> list[Outcome]:
        """Return what each rank reports or raises, in order, apart from one of them."""
        found: list[Outcome] = []
        for number, rank in enumerate(self.ranks):
            if number != without:
                try:
                    found.append(rank.reply(within))
                except WeightTransferError as error:
                    found.append(error)
        return found

    def send(self, seed: int, version: int) -> list[dict[str, Any]]:
        """Have all ranks send, and return their reports; what one raises is raised."""
        self.tell(seed, version)
        reports = []
        for outcome in self.outcomes():
            if isinstance(outcome, WeightTransferError):
                raise outcome
            reports.append(outcome)
        return reports

    def close(self) -> None:
        """Close the senders of all ranks."""
        for rank in self.ranks:
            rank.tell("close")
        for rank in self.ranks:
            rank.reply()


@attrs.frozen(eq=False)
class Troupe:
    """What one test uses of a company.

    Attributes:
        company: the whole of it.
        most: trainer ranks; workers have the devices behind theirs.
    """

    company: Company
    most: int
    _open: list[RegionTrainer | Member] = attrs.field(factory=list)

    def workers(
        self,
        kind: str,
        count: int,
        weights: Sequence[Weight] = WEIGHTS,
        *,
        alone: Sequence[str | None] = (),
        config: dict[str, Any] | None = None,
    ) -> list[Member]:
        """Start workers that keep regions of one kind.

        Args:
            kind: one of `KINDS`.
            count: how many.
            weights: of which.
            alone: by worker, see `testing.keeper`.
            config: further keys.
        """
        assert kind in KINDS
        found = []
        for number, actor in enumerate(self.company.keepers(count)):
            spec = {"worker": number, "count": count, "device": self.company.device(self.most + number)}
            spec |= {"alone": alone[number]} if alone else {}
            name = self.company.name()
            url = actor.ask("open", name=name, kind=kind, weights=weights, config=self.company.config(config), **spec)
            found.append(Member(actor, name, url))
        self._open.extend(found)
        return found

    def trainer(
        self,
        layout: str,
        size: int,
        workers: Sequence[Member],
        weights: Sequence[Weight] = WEIGHTS,
        *,
        config: dict[str, Any] | None = None,
        fresh: bool = False,
    ) -> RegionTrainer:
        """Start senders on all ranks of a trainer.

        Args:
            layout: one of `testing.shards.LAYOUTS`.
            size: how many ranks.
            workers: to which they send.
            weights: of all ranks together.
            config: further keys.
            fresh: take processes that no other test has, so that one may be killed.
        """
        devices = torch.cuda.device_count()
        if size > devices > 0 and size % devices:
            pytest.skip(f"torch's DeviceMesh wants at most {devices} ranks, as there are CUDA devices, or a multiple")
        actors = self.company.ranks(size, fresh)
        ranks = [Member(actor, self.company.name()) for actor in actors]
        spec = {"layout": layout, "weights": weights, "config": self.company.config(config)}
        for number, rank in enumerate(ranks):
            device = self.company.device(number)
            rank.tell("open", workers=[worker.url for worker in workers], device=device, **spec)
        for rank in ranks:
            rank.reply()
        trainer = RegionTrainer(ranks)
        if not fresh:
            self._open.append(trainer)
        return trainer

    def close(self) -> None:
        """Close what is open, trainers first."""
        for trainer in [each for each in self._open if isinstance(each, RegionTrainer)]:
            trainer.close()
        for worker in [each for each in self._open if isinstance(each, Member)]:
            worker.ask("close")


class Company:
    """Starts ranks and workers when they are first asked for.

    Args:
        config: returns that of every member, with further keys.
        folder: for files by which ranks find each other.

    Attributes:
        device: returns the torch device of the member with a rank, in the present test; see `Kit.device_of`.
    """

    device: Callable[[int], str]

    def __init__(self, config: Callable[..., dict[str, Any]], folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._ranks: dict[tuple[str, ...], list[Actor]] = {}  # by their devices, with which they stay
        self._keepers: list[Actor] = []
        self._fresh: list[Actor] = []
        self._count = 0

    @contextmanager
    def troupe(self, most: int = 1) -> Iterator[Troupe]:
        """Let a test use it; if the test fails, everybody is dismissed, for nobody knows in what state they are.

        Args:
            most: trainer ranks that the test has at once.
        """
        troupe = Troupe(self, most)
        try:
            yield troupe
            troupe.close()
        except BaseException:
            self.end()
            raise
        finally:
            _dismiss(self._fresh)
            self._fresh = []

    def config(self, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a member's configuration, with buckets that are small for the weights."""
        return self._config(**{"bucket_bytes": 4096} | (changes or {}))

    def name(self) -> str:
        """Return the name of a session that is new."""
        self._count += 1
        return f"session {self._count}"

    def keepers(self, count: int) -> list[Actor]:
        """Return the actors of that many workers."""
        new = [Actor("weight_transfer.testing.keeper", threads=1) for _ in range(count - len(self._keepers))]
        self._keepers += new
        for actor in new:
            actor.ready()
        return self._keepers[:count]

    def ranks(self, size: int, fresh: bool) -> list[Actor]:
        """Return the actors of a trainer's ranks."""
        devices = tuple(map(self.device, range(size)))
        if devices in self._ranks and not fresh:
            return self._ranks[devices]
        store = str(self._folder / self.name())
        spec: dict[str, Any] = {"world_size": size, "store": store, "threads": 1}
        actors = [Actor("weight_transfer.testing.rank", rank=rank, **spec) for rank in range(size)]
        if fresh:
            self._fresh += actors
        else:
            self._ranks[devices] = actors
        for actor in actors:
            actor.ready()
        return actors

    def end(self) -> None:
        """End all actors, whatever they are doing."""
        actors = [*self._keepers, *(actor for ranks in self._ranks.values() for actor in ranks)]
        self._keepers, self._ranks = [], {}
        _dismiss(actors)


def _dismiss(actors: Sequence[Actor]) -> None:
    for actor in actors:
        with suppress(ProcessLookupError):  # a test has killed it
            actor.kill()
