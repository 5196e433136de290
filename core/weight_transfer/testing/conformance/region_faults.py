"""Trainer ranks that die or stand still in an update by region: all others know which one, and nothing is torn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from weight_transfer.errors import WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.cast import Member, plays
from weight_transfer.testing.conformance.kit import needs
from weight_transfer.testing.conformance.regions import RegionsKit, assert_kept
from weight_transfer.testing.keeping import COLUMNS
from weight_transfer.testing.shards import ALONE, WEIGHTS

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.company import Company, Outcome, RegionTrainer, Troupe


_RANKS = 3
_WEIGHTS = [ALONE, *WEIGHTS]
_BY_CALLS = ("start", "finish")

phases = pytest.mark.parametrize("phase", ["ready", "start", "whole", "regions", "finish"])


class RegionFaultsTests(RegionsKit):
    """FSDP2 over three ranks, of which one is killed or stopped, at moments that a rank or a worker waits in.

    The moments: before that rank is ready; before the workers are told of the update; amid what goes whole; amid the
    regions; before the workers publish. Then fewer ranks send to the same workers, and then more.
    """

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @phases
    @plays(ranks=4, workers=2)
    def test_a_rank_that_is_killed_is_named_by_all_others(self, company: Company, phase: str) -> None:
        """All raise the same error in time; workers serve the old version or none; other ranks take over.

        If this fails: a wait of ``send_regions`` or ``receive_regions`` is for one rank only, and does not end when
        ``abort_update`` says so; or an engine goes on with connections to ranks that are gone.
        """
        with company.troupe(4) as troupe:
            workers, trainer = self._scene(troupe, fresh=True)
            victim = trainer.ranks[-1]
            self._bring_to(phase, trainer, workers)
            victim.kill()
            if phase in _BY_CALLS:
                trainer.ranks[0].tell("release")
            outcomes = trainer.outcomes(self.deadline + self.grace, without=_RANKS - 1)
            assert_blamed(outcomes, _RANKS - 1)
            self._mend(troupe, workers)

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @pytest.mark.parametrize("phase", ["start", "regions"])
    @plays(ranks=4, workers=2)
    def test_the_first_rank_that_is_killed_is_named_by_all_others(self, company: Company, phase: str) -> None:
        """Rank 0, which alone speaks to the workers: they give up by themselves, as do the other ranks.

        If this fails: as above; or a worker's engine does not look after the rank that it has nothing from.
        """
        with company.troupe(4) as troupe:
            workers, trainer = self._scene(troupe, fresh=True)
            self._bring_to(phase, trainer, workers)
            trainer.ranks[0].kill()
            assert_blamed(trainer.outcomes(self.deadline + self.grace, without=0)[-2:], 0)
            self._mend(troupe, workers)

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @phases
    @plays(ranks=4, workers=2)
    def test_a_rank_that_stands_still_is_named_by_all_others_unless_it_is_not_needed(
        self, company: Company, phase: str
    ) -> None:
        """As if it was killed, by the deadline; where it had given all before, the update may also be a good one.

        If this fails: a wait for a rank has no deadline; or a worker reports bytes that it has not got.
        """
        with company.troupe(4) as troupe:
            workers, trainer = self._scene(troupe)
            self._bring_to(phase, trainer, workers)
            with trainer.ranks[-1].stopped():
                if phase in _BY_CALLS:
                    trainer.ranks[0].tell("release")
                for worker in workers:
                    worker.ask("release")
                outcomes = trainer.outcomes(self.deadline + self.grace, without=_RANKS - 1)
                good = phase in ("whole", "regions", "finish") and not isinstance(outcomes[0], WeightTransferError)
                if good:
                    assert [outcome["version"] for outcome in outcomes if isinstance(outcome, dict)] == [2, 2]
                    assert_kept(workers, 2, 2)
                else:
                    assert_blamed(outcomes, _RANKS - 1)
            if phase != "ready":
                with contextlib.suppress(WeightTransferError):
                    trainer.ranks[-1].reply(self.deadline + self.grace)
            self._mend(troupe, workers)

    def _scene(self, troupe: Troupe, fresh: bool = False) -> tuple[list[Member], RegionTrainer]:
        """Return two workers and a trainer, after an update."""
        hasty = self.hasty() | {"init_timeout": self.deadline + self.grace}
        patient = hasty | {"timeout": 3 * hasty["timeout"]}  # else it may give the update up first
        workers = troupe.workers(COLUMNS, 2, _WEIGHTS, alone=("loader", None), config=patient)
        trainer = troupe.trainer("fsdp", _RANKS, workers, _WEIGHTS, config=hasty, fresh=fresh)
        trainer.send(1, 1)
        assert_kept(workers, 1, 1)
        return workers, trainer

    def _bring_to(self, phase: str, trainer: RegionTrainer, workers: Sequence[Member]) -> None:
        """Have all ranks send, and wait until the update stands still at a moment."""
        if phase in _BY_CALLS:
            trainer.ranks[0].ask("hold", at=phase)
        elif phase != "ready":
            workers[0].ask("block", amid=phase)
        trainer.tell(2, 2, without=_RANKS - 1 if phase == "ready" else None)
        if phase in _BY_CALLS:
            assert trainer.ranks[0].reply() == "held"
        elif phase != "ready":
            assert workers[0].reply() == "blocked"

    def _mend(self, troupe: Troupe, workers: Sequence[Member]) -> None:
        """See that nothing is torn, and have other ranks send."""
        for worker in workers:
            worker.ask("release")
            status = self.settled(worker)
            assert status["version"] in (1, 2, None)
            if status["version"] is not None:
                assert_kept([worker], status["version"], status["version"])
        for version, (layout, size) in enumerate((("tp", 2), ("fsdp", 4)), 3):
            trainer = troupe.trainer(layout, size, workers, _WEIGHTS)
            trainer.send(version, version)
            assert_kept(workers, version, version)


def assert_blamed(outcomes: Sequence[Outcome], rank: int) -> None:
    """Fail unless each rank has raised an error that names one rank."""
    for outcome in outcomes:
        assert isinstance(outcome, WeightTransferError), f"a rank has taken the update for a good one: {outcome}"
        assert f"trainer rank {rank}" in str(outcome), repr(outcome)
