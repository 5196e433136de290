"""The middle of an update, on trainer rank 0: all ranks give their weights, and all workers take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import LifecycleError, TransferTimeoutError, WeightsMovedError, WeightTransferError
from weight_transfer.session.calls import ECHOES, moved_in, refused_in
from weight_transfer.session.part import StartOver
from weight_transfer.session.progress import Progress
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.control.message import Message
    from weight_transfer.engine import TrainerWeightTransferEngine
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.plan.exchange import OutgoingRegions
    from weight_transfer.session.calls import Calls, Lost
    from weight_transfer.session.comparing import SentTables
    from weight_transfer.session.crew import Crew
    from weight_transfer.session.fleet import Fleet
    from weight_transfer.session.guarded import GuardedSource
    from weight_transfer.session.part import Part
    from weight_transfer.session.peers import Peer
    from weight_transfer.session.region_plan import RegionPlan
    from weight_transfer.session.running import Running

_MUCH = 2**26  # bytes: less has arrived before a worker hears what becomes of it
_GRACE = 1.0  # seconds in which a rank that was stopped by an abort says so


class Refused(Exception):  # noqa: N818  (the update may still succeed)
    """A worker does not let this trainer begin an update: it was started anew, or has joined another one."""

    def __init__(self, error: LifecycleError) -> None:
        super().__init__(str(error))
        self.error = error


class Moving:
    """Moves the bytes of updates.

    Args:
        notify: tells the listeners.
        config: the trainer's.
        fleet: the workers, on which an update is open.
        crew: the other ranks.
    """

    def __init__(
        self, notify: Callable[[str, object], object], config: WeightTransferConfig, fleet: Fleet, crew: Crew
    ) -> None:
        self._notify = notify
        self._config = config
        self._fleet = fleet
        self._crew = crew

    def run(
        self, update: Running, plan: RegionPlan, deadline: Deadline, begins: bool
    ) -> tuple[Lost, dict[Peer, WorkerReport]]:
        """Move the bytes; return the workers that were lost, and what each has noticed."""
        engine = self._engine
        source = update.begin(plan, verifies=self._verifies)
        fields = self._described(update, source, deadline)
        outgoing = plan.outgoing(update.part)
        goes_blindly = engine.tolerates_moves and outgoing is None and self._crew.size == 1
        decides = begins and goes_blindly and plan.manifest.nbytes >= _MUCH
        if not goes_blindly:
            self._require_unmoved(update.part)
        shares = self._shares(plan, outgoing, deadline) if outgoing is not None else None
        info = self._told(update, source.update, plan, deadline, {**fields, "shares": shares})
        peers = self._fleet.started
        calls = update.calls = self._call(peers, update.outgoing.messages(info, peers), begins, deadline)
        progress = Progress(self._notify, info, self._config.backend)
        update.phases.enter("wire")
        try:
            self._fleet.require_going_on()
            regions = self._give(update, source, plan, outgoing, deadline, progress, decides)
            sent = None
            if self._verifies:
                with update.phases.within("verify"):
                    sent = update.tables(plan, regions)
            if decides:
                self._decide(update, source, sent)
            failures = calls.wait(deadline)
        except StartOver:
            raise
        except Exception as error:
            cause = self._behind(error, update, source, calls, begins)
            if cause is error:
                raise
            raise cause from error
        refusal = refused_in(failures) if begins else None
        if refusal is not None:
            raise Refused(refusal)
        moved = moved_in(failures)
        if moved is not None:
            raise StartOver(str(moved))
        noticed = {peer: WorkerReport.of(calls.results.get(peer)) for peer in peers}
        if sent is not None:
            answered = {peer: report for peer, report in noticed.items() if peer not in failures}
            with update.phases.within("verify"):
                failures |= self._unlike(sent, answered, deadline)
        update.outgoing.remember(info, peers, failures)
        lost = self._fleet.settle(failures)
        progress(progress.left)
        engine.release_source()
        update.outgoing.update, update.outgoing.blindly = source.update, goes_blindly and not plan.manifest.partial
        for peer, report in noticed.items():
            if report.asks_again:
                peer.kept.pop(update.part.target, None)
        return lost, noticed

    @property
    def _engine(self) -> TrainerWeightTransferEngine[Any, Any]:
        engine = self._fleet.engines.own
        assert engine is not None
        return engine

    def _described(self, update: Running, source: GuardedSource, deadline: Deadline) -> Mapping[str, Any]:
        """Return what the engine says of the update.

        Raises:
            StartOver: it fails, and the source has said something else than is.
        """
        try:
            return self._engine.describe_update(source, source.manifest(), deadline)
        except Exception as error:
            if not update.part.confirm():
                raise StartOver("weights were replaced or moved since the last update") from error
            raise

    def _told(
        self, update: Running, name: str, plan: RegionPlan, deadline: Deadline, fields: Mapping[str, Any]
    ) -> WeightTransferUpdateInfo:
        """Have all ranks send; return what the workers are told: ``name`` is the id of the weights."""
        if self._crew.size > 1:
            update.in_lockstep = True
            self._crew.order("send", deadline)
        info: WeightTransferUpdateInfo = self._engine.update_info_cls(
            manifest=plan.manifest,
            timeout=max(deadline.remaining(), 1e-3),
            version=update.version,
            is_checkpoint_format=self._config.is_checkpoint_format,
            target=update.part.target,
            update=name,
            allow_rollback=update.part.allow_rollback,
            base=update.outgoing.update if plan.manifest.partial else None,
            verify=None if self._config.verify == "none" else self._config.verify,
            layout=plan.wire,
            kept=plan.kept,
            **fields,
        )
        return info

    def _call(self, peers: list[Peer], messages: Mapping[Peer, Message], begins: bool, deadline: Deadline) -> Calls:
        """Have the workers receive; if the update ``begins`` with that, it opens on them."""
        if begins:
            method, call = "begin_weight_update", lambda peer: peer.begin(messages[peer])
        else:
            method, call = "update_weights", lambda peer: peer.update(messages[peer])
        return self._fleet.call(peers, call, method, deadline, self._fleet.react)

    def _give(
        self,
        update: Running,
        source: GuardedSource,
        plan: RegionPlan,
        outgoing: OutgoingRegions | None,
        deadline: Deadline,
        progress: Progress,
        decides: bool,
    ) -> list[dict[str, str]]:
        """Let the engine send, on every rank; return each rank's tables of what went by region, if that is compared.

        If it ``decides``, a single worker may publish once it has all, which can be said before all has been sent.

        Raises:
            StartOver: a rank has sent what its model does not hold any more.
        """
        part = update.part

        def moved(nbytes: int) -> None:
            is_right = part.look_on()  # a little each time: bytes would wait for all of it, or all of it for bytes
            if is_right and decides and not self._verifies:
                self._decide(update, source, None)
            progress(nbytes)

        if source.manifest().params:
            if self._verifies:  # digests read right away
                self._require_unmoved(part)
            with update.noting(partial(self._go_on, deadline)), source.watched():
                self._engine.send_weights(source, source.manifest(), deadline, moved)
                source.finish()
                is_right = part.confirm()
        else:
            is_right = part.confirm()
        if outgoing is not None:
            self._engine.send_regions(outgoing, deadline, progress)
        own = [plan.digests(outgoing)] if outgoing is not None and self._verifies else []
        answers = self._crew.answers("to give their weights", deadline)
        if not (is_right and all(answer.get("right", True) for answer in answers)):
            raise StartOver("weights were replaced since the last update")
        return [*own, *(answer.get("digests", {}) for answer in answers)] if own else []

    def _decide(self, update: Running, source: GuardedSource, sent: SentTables | None) -> None:
        """Let a single worker publish once it has received what was ``sent``: there is nobody else to wait for."""
        if not update.decided:
            update.decided = True
            self._fleet.decide(source.update, sent.digest if sent is not None else "")

    @staticmethod
    def _require_unmoved(part: Part) -> None:
        if not part.is_unmoved():
            raise StartOver("weights were moved since the last update")

    @property
    def _verifies(self) -> bool:
        return self._config.verify != "none"

    def _unlike(self, sent: SentTables, answered: dict[Peer, WorkerReport], deadline: Deadline) -> Lost:
        """Return the workers that have received something else than was sent; they give up what they have."""
        refusals = {peer: sent.refusal(peer, report.receipts) for peer, report in answered.items()}
        return self._fleet.refuse(refusals, deadline)

    def _go_on(self, deadline: Deadline) -> None:
        """Raise if this rank need not go on with its own work on an update."""
        deadline.check("taking digests of the weights", backend=self._config.backend, phase="update")
        self._fleet.require_going_on()

    def _shares(self, plan: RegionPlan, outgoing: OutgoingRegions, deadline: Deadline) -> tuple[dict[str, Any], ...]:
        """Return what the engines of all ranks say of their shards; the same object while that is unchanged."""
        if self._crew.size > 1:
            self._crew.order("share", deadline)
        own = self._engine.share_regions(outgoing, deadline)
        answers = self._crew.answers("to share their weights", deadline)
        return plan.shares([own, *(answer["share"] for answer in answers)])

    def _lost_in(self, source: GuardedSource) -> Exception | None:
        """Return the error of the rank that is gone, if a collective has failed: that does not say which one it was."""
        foreign = source.collective and source.error is not None and not isinstance(source.error, WeightTransferError)
        return self._crew.lost(_GRACE) if foreign else None

    def _behind(
        self, error: Exception, update: Running, source: GuardedSource, calls: Calls, begins: bool
    ) -> BaseException:
        """Return what to raise for an error in an update: what has caused it, or what lets it be sent anew."""
        cause = self._lost_in(source) or source.error or self._cause(error, calls)
        refusal = refused_in(calls.failures) if begins else None
        if refusal is not None and cause is refusal:
            return Refused(refusal)
        if isinstance(cause, WeightsMovedError) or not update.part.confirm():  # whose reads then may fail
            return StartOver(str(cause))
        return cause

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
