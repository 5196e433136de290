"""One update of the trainer: what it sends whole, and in which state that is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from weight_transfer.session.comparing import SentTables
from weight_transfer.session.guarded import GuardedSource, named
from weight_transfer.session.phases import Phases
from weight_transfer.session.sent import Sent
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weight_transfer.session.calls import Calls
    from weight_transfer.session.outgoing import Outgoing
    from weight_transfer.session.part import Part
    from weight_transfer.session.peers import Peer
    from weight_transfer.session.region_plan import RegionPlan
    from weight_transfer.values.events import Version


_GRACE = 0.3  # seconds in which an answer comes that is under way


class Running:
    """One update.

    Attributes:
        part: what this rank sends.
        outgoing: what the sender keeps of the target.
        version: the new one.
        phases: where its time goes.
        in_lockstep: whether the other ranks have been told to run the source's collectives.
        decided: whether it is decided that a single worker publishes once it has received it.
        calls: those that have it receive; None before.
    """

    def __init__(self, part: Part, outgoing: Outgoing, version: Version) -> None:
        self.part = part
        self.outgoing = outgoing
        self.version = version
        self.phases = Phases()
        self.in_lockstep = self.decided = False
        self.calls: Calls | None = None
        self._source: GuardedSource | None = None
        self._sent: Sent | None = None

    def begin(self, plan: RegionPlan, *, verifies: bool) -> GuardedSource:
        """Return the guarded source of what goes whole; if the update ``verifies``, digests are taken."""
        whole, manifest = self.part.whole(plan.layout), self.part.manifest
        manifest = manifest if whole is self.part.source else whole.manifest()
        self._sent = Sent(manifest, self.outgoing.residents) if verifies else None
        self._source = GuardedSource(whole, manifest, self._sent)
        return self._source

    def noting(self, go_on: Callable[[], None]) -> AbstractContextManager[None]:
        """Take digests of what the engine sends inside a ``with`` block, if that is asked for; ``go_on`` may end it."""
        assert self._source is not None
        if self._sent is None:
            return nullcontext()
        return self._sent.beside(self._source.resident(), self._source.masters(), go_on)

    def tables(self, plan: RegionPlan, regions: Sequence[dict[str, str]]) -> SentTables:
        """Return what was sent; ``regions`` are the tables of each rank."""
        assert self._source is not None and self._sent is not None
        return SentTables(self._source.manifest(), plan, self._sent.table(), regions)

    @property
    def gathered(self) -> int:
        """Bytes of the weights that were gathered from several ranks."""
        source = self._source
        if source is None or not source.collective:
            return 0
        here = source.resident().keys() | source.masters().keys()
        return sum(param.nbytes for param in source.manifest().params if param.name not in here)

    def seconds(self) -> dict[str, float]:
        """Return where the time went, by phase; the update is over."""
        if self._source is not None and self._source.seconds:
            self.phases.move(self._source.seconds, "wire", "gather")
        return self.phases.told()

    def published(self) -> list[Peer]:
        """Return who has published it by its own, after a failure: all workers have been told to give it up."""
        if not self.decided or self.calls is None:
            return []
        answers = self.calls.late(Deadline(_GRACE))
        return [peer for peer, answer in answers.items() if WorkerReport.of(answer).published]

    def drain(self) -> None:
        """Finish the source's collectives, if other ranks run them."""
        if self._source is not None and self.in_lockstep:
            self._source.drain()

    def named(self, error: BaseException, backend: str) -> BaseException:
        """Give an error its place in the tree."""
        return self._source.named(error, backend, self.version) if self._source else named(error, backend, self.version)
