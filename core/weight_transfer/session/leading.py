"""Trainer rank 0: brings the workers to the new weights, and tells the other ranks what to give and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from weight_transfer.config.settings import RECEIVER
from weight_transfer.config.structuring import unstructure
from weight_transfer.errors import LifecycleError, TransferTimeoutError, WeightTransferError
from weight_transfer.memory.gpu_digests import Geometry
from weight_transfer.session.asking import Asking
from weight_transfer.session.calls import ECHOES, refused_in
from weight_transfer.session.guarded import named
from weight_transfer.session.part import Part, require_alike
from weight_transfer.session.progress import Progress, timed
from weight_transfer.session.region_plan import RegionPlan
from weight_transfer.session.running import Running
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import TransferFinished, TransferStarted
from weight_transfer.values.report import TransferReport, WorkerReport

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.engine import TrainerWeightTransferEngine
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.plan.exchange import OutgoingRegions
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.calls import Calls, Lost
    from weight_transfer.session.comparing import SentTables
    from weight_transfer.session.crew import Crew
    from weight_transfer.session.fleet import Fleet
    from weight_transfer.session.guarded import GuardedSource
    from weight_transfer.session.lines import Message
    from weight_transfer.session.outgoing import Outgoing
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.events import Version

logger = logging.getLogger(__name__)

_MANY = 500  # weights for each worker: fewer are looked at in less time than it takes to tell it of the update
_GRACE = 1.0  # seconds in which a rank that was stopped by an abort says so
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
        self._geometry = Geometry()

    def send(self, prepare: Callable[[], Part], outgoing: Outgoing, choose: Callable[[], Version]) -> TransferReport:
        """Bring all workers to this rank's and the others' weights.

        Args:
            prepare: reads this rank's weights.
            outgoing: what the sender keeps of the target.
            choose: returns the version.

        Raises:
            WeightTransferError: the update failed; all ranks raise the same.
        """
        met = False
        self._fleet.serve_with(self._crew)
        try:
            if outgoing.params >= _MANY * len(self._fleet.peers):
                self._fleet.expect()
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
            known = named(error, self._config.backend, None) if self._crew.size > 1 else error
            self._crew.end(None, known)
            if known is error:
                raise
            raise known from error
        self._crew.end(unstructure(report), None)
        outgoing.params = report.params
        return report

    def forget(self) -> None:
        """Let go of the weights."""
        self._plans.clear()
        self._geometry = Geometry()

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
        ended: dict[str, Any] = {"phases": {}}
        update = Running(part, outgoing, version)
        try:
            try:
                report = self._send(update, readies, ended["phases"], self._fleet.may_begin and self._crew.size == 1)
            except _Refused as refusal:
                logger.info("joining all workers anew, since one has refused the update: %s", refusal.error)
                self._fleet.abort(str(refusal.error))
                ended["phases"].clear()
                report = self._send(update, readies, ended["phases"], begins=False)
            ended |= {"workers": report.workers, "lost": report.lost}
            return report
        except BaseException as error:
            known = update.named(error, self._config.backend)
            self._fleet.abort(str(known) or type(known).__name__)  # Ctrl-C says nothing
            known = self._fleet.tenure.cause(known)
            ended |= {"error": str(known) or type(known).__name__, "error_type": type(known).__name__}
            if known is error:
                raise
            raise known from error
        finally:
            with suppress(Exception) if "error" in ended else nullcontext():  # a collective that broke does so again
                update.drain()
            event = TransferFinished(**common, seconds=time.monotonic() - since, **ended)
            self._backend.notify("weight_transfer_finished", event)

    def _send(
        self, update: Running, readies: Sequence[Message], seconds: dict[str, float], begins: bool
    ) -> TransferReport:
        """Run the update; if it ``begins`` with one call, workers hear of its start and of its weights at once.

        ``seconds`` takes in what each phase takes.

        Raises:
            _Refused: a worker has refused to begin; it may join again.
        """
        lost: Lost = {}
        fleet, part = self._fleet, update.part
        fleet.place(part.device)
        with timed(seconds, "init"):
            lost |= fleet.join()
            fleet.require_one(lost)
            if not part.allow_rollback:
                fleet.require_forward(part.target, update.version)
            plan = self._plan(part, readies, lost)
        deadline = Deadline(self._config.timeout)
        with timed(seconds, "start"):
            if begins and fleet.may_begin:  # while the others joined one may have been lost
                fleet.begin()
            else:
                begins = False
                lost |= fleet.start(deadline, lambda gone: self._plan(part, readies, gone))
            fleet.require_one(lost)
            if lost and deadline.expired:  # whoever was waited for is to be named, not who is called next
                raise next(reversed(lost.values()))
        with timed(seconds, "update"):
            failures, noticed = self._update(update, plan, deadline, begins)
            lost |= failures
            fleet.require_one(lost)
        with timed(seconds, "finish"):
            lost |= fleet.finish(update.version, part.target, update.outgoing.update, deadline)
            fleet.require_one(lost)
        return self._report(update, plan, seconds, lost, noticed)

    def _plan(self, part: Part, readies: Sequence[Message], lost: Lost) -> RegionPlan:
        """Decide what goes by region, and tell the other ranks if that has changed; ``lost`` takes in workers."""
        plan = self._plans.setdefault(part.target, RegionPlan())
        changed = plan.refresh(part, readies, Asking(self._fleet, self._config, part.target, lost))
        if self._crew.size > 1 and (changed or any(ready["plan"] != plan.id for ready in readies)):
            self._crew.ask("plan", "to plan", Deadline(self._config.timeout), **plan.to_wire())
        return plan

    def _update(
        self, update: Running, plan: RegionPlan, deadline: Deadline, begins: bool
    ) -> tuple[Lost, dict[Peer, WorkerReport]]:
        """Move the bytes; return the workers that were lost, and what each has noticed."""
        engine, fleet, crew = self._fleet.engines.own, self._fleet, self._crew
        assert engine is not None
        source = update.begin(plan, self._geometry if self._verifies else None)
        manifest = source.manifest()
        fields = engine.describe_update(source, manifest, deadline)
        outgoing = plan.outgoing(update.part)
        shares = self._shares(engine, plan, outgoing, deadline) if outgoing is not None else None
        if crew.size > 1:
            update.in_lockstep = True
            crew.order("send", deadline)
        info: WeightTransferUpdateInfo = engine.update_info_cls(
            manifest=plan.manifest,
            timeout=max(deadline.remaining(), 1e-3),
            version=update.version,
            is_checkpoint_format=self._config.is_checkpoint_format,
            target=update.part.target,
            update=source.update,
            allow_rollback=update.part.allow_rollback,
            base=update.outgoing.update if plan.manifest.partial else None,
            verify=None if self._config.verify == "none" else self._config.verify,
            layout=plan.wire,
            shares=shares,
            kept=plan.kept,
            **fields,
        )
        messages = update.outgoing.messages(info, fleet.started)
        if begins:
            method, call = "begin_weight_update", lambda peer: peer.begin(messages[peer])
        else:
            method, call = "update_weights", lambda peer: peer.update(messages[peer])
        calls = fleet.call(list(messages), call, method, deadline, fleet.react)
        fleet.require_going_on()
        progress = Progress(self._backend.notify, info, self._config.backend)
        try:
            if manifest.params:
                with source.watched(), update.noting(partial(self._go_on, deadline)):
                    engine.send_weights(source, manifest, deadline, progress)
                    source.finish()
            if outgoing is not None:
                engine.send_regions(outgoing, deadline, progress)
            regions = [plan.digests(outgoing)] if outgoing is not None and self._verifies else []
            answers = crew.answers("to give their weights", deadline)
            failures = calls.wait(deadline)
        except Exception as error:
            cause = self._lost_in(source) or source.error or self._cause(error, calls)
            refusal = refused_in(calls.failures) if begins else None
            if refusal is not None and cause is refusal:
                raise _Refused(refusal) from error
            if cause is error:
                raise
            raise cause from error
        refusal = refused_in(failures) if begins else None
        if refusal is not None:
            raise _Refused(refusal)
        noticed = {peer: WorkerReport.of(calls.results.get(peer)) for peer in messages}
        if self._verifies:
            regions += [answer.get("digests", {}) for answer in answers] if regions else []
            answered = {peer: report for peer, report in noticed.items() if peer not in failures}
            failures |= self._unlike(update.tables(plan, regions), answered, deadline)
        update.outgoing.remember(info, list(messages), failures)
        lost = fleet.settle(failures)
        progress(progress.left)
        engine.release_source()
        update.outgoing.update = source.update
        for peer, report in noticed.items():
            if report.asks_again:
                peer.kept.pop(update.part.target, None)
        return lost, noticed

    @property
    def _verifies(self) -> bool:
        return self._config.verify != "none"

    def _unlike(self, sent: SentTables, answered: dict[Peer, WorkerReport], deadline: Deadline) -> Lost:
        """Return the workers that have received something else than was sent; they give up what they have."""
        refusals = ((peer, sent.refusal(peer, report.receipts)) for peer, report in answered.items())
        unlike: Lost = {peer: refusal for peer, refusal in refusals if refusal is not None}
        if unlike and self._config.on_worker_failure == "continue":  # else all workers are to give up
            aborting = list(unlike)
            calls = self._fleet.call(
                aborting, lambda peer: peer.abort(str(unlike[peer])), "abort_weight_update", deadline
            )
            calls.wait(deadline)
        return unlike

    def _go_on(self, deadline: Deadline) -> None:
        """Raise if this rank need not go on with its own work on an update."""
        deadline.check("taking digests of the weights", backend=self._config.backend, phase="update")
        self._fleet.require_going_on()

    def _shares(
        self,
        engine: TrainerWeightTransferEngine[Any, Any],
        plan: RegionPlan,
        outgoing: OutgoingRegions,
        deadline: Deadline,
    ) -> tuple[dict[str, Any], ...]:
        """Return what the engines of all ranks say of their shards; the same object while that is unchanged."""
        if self._crew.size > 1:
            self._crew.order("share", deadline)
        own = engine.share_regions(outgoing, deadline)
        answers = self._crew.answers("to share their weights", deadline)
        return plan.shares([own, *(answer["share"] for answer in answers)])

    def _lost_in(self, source: GuardedSource) -> Exception | None:
        """Return the error of the rank that is gone, if a collective has failed: that does not say which one it was."""
        foreign = source.collective and source.error is not None and not isinstance(source.error, WeightTransferError)
        return self._crew.lost(_GRACE) if foreign else None

    def _cause(self, error: Exception, calls: Calls) -> Exception:
        """Return what is behind an error: a rank that is gone or fails by itself, a worker's failure, or itself."""
        failed = self._fleet.failed
        if failed is not None and not self._fleet.failed_after_others:
            return failed
        known = failed or error
        if not isinstance(known, WeightTransferError):
            return known
        cause = calls.explain(known)
        silent = ""
        if isinstance(cause, ECHOES):
            self._crew.abort()
            silent = self._crew.silent(Deadline(_GRACE))
        if not silent:
            return cause
        message = "It does not answer; what others say follows from that."
        return TransferTimeoutError(message, phase="update", peer=silent, cause=str(cause))

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
        )


class _Refused(Exception):  # noqa: N818  (the update may still succeed)
    """A worker does not let this trainer begin an update: it was started anew, or has joined another one."""

    def __init__(self, error: LifecycleError) -> None:
        super().__init__(str(error))
        self.error = error
