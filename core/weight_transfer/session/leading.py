"""Trainer rank 0: brings the workers to the new weights, and tells the other ranks what to give and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.config.settings import RECEIVER
from weight_transfer.config.structuring import unstructure
from weight_transfer.errors import WeightTransferError
from weight_transfer.session.asking import Asking
from weight_transfer.session.calls import ECHOES
from weight_transfer.session.guarded import named
from weight_transfer.session.moving import Moving, Refused
from weight_transfer.session.part import Part, StartOver, require_alike
from weight_transfer.session.progress import Laps
from weight_transfer.session.region_plan import RegionPlan
from weight_transfer.session.running import Running
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import TransferFinished, TransferStarted
from weight_transfer.values.report import TransferReport, WorkerReport

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.calls import Lost
    from weight_transfer.session.crew import Crew
    from weight_transfer.session.fleet import Fleet
    from weight_transfer.session.lines import Message
    from weight_transfer.session.outgoing import Outgoing
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.events import Version

logger = logging.getLogger(__name__)

_LATE = 1.0  # seconds in which the other ranks may call send, to learn of an error that came before


class Leader:
    """Rank 0 of the trainer, which may be its only one.

    Args:
        backend: the loaded backend.
        config: the trainer's.
        fleet: the workers.
        crew: the other ranks.
    """

    def __init__(self, backend: LoadedBackend, config: WeightTransferConfig, fleet: Fleet, crew: Crew) -> None:
        self._backend = backend
        self._config = config
        self._fleet = fleet
        self._crew = crew
        self._plans: dict[str, RegionPlan] = {}
        self._moving = Moving(backend.notify, config, fleet, crew)

    def send(self, prepare: Callable[[], Part], outgoing: Outgoing, choose: Callable[[], Version]) -> TransferReport:
        """Bring all workers to this rank's and the others' weights.

        Args:
            prepare: reads this rank's weights.
            outgoing: what the sender keeps of the target.
            choose: returns the version.

        Raises:
            WeightTransferError: the update failed; all ranks raise the same.
            StartOver: all ranks have to send anew.
        """
        met = False
        self._fleet.serve_with(self._crew)
        try:
            asks = RECEIVER in self._config.cast.values()  # then workers join while it prepares, on every rank
            early = None if asks else prepare()
            readies = self._crew.meet(Deadline(self._config.timeout))
            met = True
            self._crew.on_failure = self._react
            part = early or prepare()
            for rank, ready in enumerate(readies, 1):
                require_alike(part, ready, rank)
            self._fleet.require_generation([ready["engine"] for ready in readies])
            report = self._observed(part, readies, outgoing, choose())
        except BaseException as error:
            if not met:
                with suppress(WeightTransferError):  # what they are to hear is the error itself
                    self._crew.meet(Deadline(_LATE))
            self._plans.clear()
            if isinstance(error, StartOver):
                self._crew.start_over(str(error))
                self._fleet.forget_echoes()
                raise
            known = named(error, self._config.backend, None) if self._crew.size > 1 else error
            self._crew.end(None, known)
            if known is error:
                raise
            raise known from error
        self._crew.end(unstructure(report) if self._crew.size > 1 else None, None)
        return report

    def forget(self) -> None:
        """Let go of the weights."""
        self._plans.clear()

    def close(self) -> None:
        """Let go of the other ranks."""
        self.forget()
        self._crew.close()

    def _react(self, error: WeightTransferError, gone: bool) -> None:
        """Another rank failed; if it still answers, that may be the echo of a worker's failure."""
        self._fleet.fail(error, after_others=not gone and isinstance(error, ECHOES))

    def _observed(self, part: Part, readies: Sequence[Message], outgoing: Outgoing, version: Version) -> TransferReport:
        """Run the update between its two events; what fails is aborted on all workers, and named."""
        common: dict[str, Any] = {"role": "trainer", "backend": self._config.backend, "version": version}
        common |= {"nbytes": part.manifest.nbytes, "target": part.target}
        started = TransferStarted(**common, params=len(part.manifest.params), workers=len(self._fleet.peers))
        self._backend.notify("weight_transfer_started", started)
        since = time.monotonic()
        ended: dict[str, Any] = {"link": self._config.link}
        update = Running(part, outgoing, version)
        try:
            try:
                report = self._send(update, readies, self._fleet.may_begin)
            except Refused as refusal:
                if self._crew.size > 1:
                    raise StartOver(str(refusal.error)) from refusal
                logger.info("joining all workers anew, since one has refused the update: %s", refusal.error)
                self._fleet.abort(str(refusal.error))
                report = self._send(update, readies, begins=False)
            ended |= {"workers": report.workers, "lost": report.lost, "worker_phases": report.worker_seconds}
            return report
        except BaseException as error:
            known = error if isinstance(error, StartOver) else update.named(error, self._config.backend)
            self._fleet.abort(str(known) or type(known).__name__)  # Ctrl-C says nothing
            known = self._fleet.tenure.cause(known)
            if isinstance(known, WeightTransferError):
                published = update.published()
                if published:
                    known = self._fleet.half_committed(known, version, published, published)
            ended |= {"error": str(known) or type(known).__name__, "error_type": type(known).__name__}
            if known is error:
                raise
            raise known from error
        finally:
            with suppress(Exception) if "error" in ended else nullcontext():  # a collective that broke does so again
                update.drain()
            phases = update.seconds()
            event = TransferFinished(**common, seconds=time.monotonic() - since, phases=phases, **ended)
            self._backend.notify("weight_transfer_finished", event)

    def _send(self, update: Running, readies: Sequence[Message], begins: bool) -> TransferReport:
        """Run the update; if it ``begins`` with one call, workers hear of its start and of its weights at once.

        Raises:
            Refused: a worker has refused to begin; it may join again.
        """
        lost: Lost = {}
        laps = Laps()
        fleet, part, within = self._fleet, update.part, update.phases.within
        fleet.place(part.device)
        with within("init"):
            lost |= fleet.join()
            fleet.require_one(lost)
            if not part.allow_rollback:
                fleet.require_forward(part.target, update.version)
            with within("plan"):
                plan = self._plan(part, readies, lost)
        laps.end("init")
        deadline = Deadline(self._config.timeout)
        with within("start"):
            if begins and fleet.may_begin:  # while the others joined one may have been lost
                fleet.begin()
            else:
                begins = False
                lost |= fleet.start(deadline, lambda gone: self._plan(part, readies, gone))
            fleet.require_one(lost)
            if lost and deadline.expired:  # whoever was waited for is to be named, not who is called next
                raise next(reversed(lost.values()))
        laps.end("start")
        with within("plan"):
            failures, noticed = self._moving.run(update, plan, deadline, begins)
            lost |= failures
            fleet.require_one(lost)
        laps.end("update")
        with within("commit"):
            published = [peer for peer, report in noticed.items() if report.published]
            lost |= fleet.finish(update.version, part.target, update.outgoing.update, deadline, published)
            fleet.require_one(lost)
        laps.end("finish")
        return self._report(update, plan, laps.seconds, lost, noticed)

    def _plan(self, part: Part, readies: Sequence[Message], lost: Lost) -> RegionPlan:
        """Decide what goes by region, and tell the other ranks if that has changed; ``lost`` takes in workers."""
        plan = self._plans.setdefault(part.target, RegionPlan())
        changed = plan.refresh(part, readies, Asking(self._fleet, self._config, part.target, lost))
        if self._crew.size > 1 and (changed or any(ready["plan"] != plan.id for ready in readies)):
            self._crew.ask("plan", "to plan", Deadline(self._config.timeout), **plan.to_wire())
        return plan

    def _report(
        self,
        update: Running,
        plan: RegionPlan,
        seconds: dict[str, float],
        lost: Lost,
        noticed: dict[Peer, WorkerReport],
    ) -> TransferReport:
        noticed = {peer: report for peer, report in noticed.items() if peer not in lost}
        moved = [report.moved for report in noticed.values() if report.moved]
        return TransferReport(
            backend=self._config.backend,
            version=update.version,
            target=update.part.target,
            nbytes=plan.manifest.nbytes,
            params=len(plan.manifest.params),
            workers=tuple(peer.address for peer in self._fleet.peers if peer not in lost),
            lost=tuple((peer.address, str(error)) for peer, error in lost.items()),
            seconds=seconds,
            extra_memory=self._fleet.engines.own.extra_memory if self._fleet.engines.own else 0,
            transports={peer.address: report.transport for peer, report in noticed.items() if report.transport},
            warnings=tuple(f"{peer.address}: {text}" for peer, report in noticed.items() for text in report.warnings),
            kept={peer.address: report.kept for peer, report in noticed.items() if report.kept},
            given=tuple(map(sum, zip(*moved, strict=True))),
            gathered=update.gathered,
            gathered_because=plan.reason if update.gathered else "",
            receipts={peer.address: report.receipts for peer, report in noticed.items() if report.receipts},
            worker_seconds={peer.address: dict(report.seconds) for peer, report in noticed.items() if report.seconds},
        )
