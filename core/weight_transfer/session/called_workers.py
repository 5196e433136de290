"""The sender's workers, and calls to them that may be given up; what becomes of those that fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from weight_transfer.errors import ReplacedError, SessionError, TransferError, WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.session.calls import ABORT_TIMEOUT, Calls, Lost, cause_of
from weight_transfer.session.engines import Engines
from weight_transfer.session.inbox import Bell
from weight_transfer.session.tenure import Tenure
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import MembershipChanged

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.peers import Peer

logger = logging.getLogger(__name__)

_ABORT_GRACE = 0.3  # seconds that they get though the deadline has passed


class CalledWorkers:
    """Workers that are called together, and given up together.

    Attributes:
        peers: all workers, lost ones included: they may come back; none after `close`.
        engines: the trainer's; rank 0 has none before the first join, and after a failure of a backend without
            ``REJOIN``.
        tenure: the trainer's hold on them.
        failed: what has ended the present update from outside: it was cancelled, or another trainer rank failed.
        failed_after_others: whether that may follow from a worker's failure.
    """

    def __init__(
        self,
        backend: LoadedBackend,
        config: WeightTransferConfig,
        parallel_config: ParallelConfig,
    ) -> None:
        self.peers: list[Peer] = []
        self.engines = Engines(backend, config, parallel_config)
        self._config = config
        self._rejoins = Capability.REJOIN in backend.backend.capabilities
        self._notify = backend.notify
        self.tenure = Tenure()
        self.failed: WeightTransferError | None = None
        self.failed_after_others = False
        self._calls: Calls | None = None
        self._bell = Bell()
        self._latest: object = None
        self._reacting = threading.Lock()
        self._deadline = Deadline(0.0)

    @property
    def goes_on(self) -> bool:
        """Whether the others go on when one worker fails in the middle of an update."""
        return self._rejoins and self._may_lose

    @property
    def _may_lose(self) -> bool:
        """Whether a worker that does not answer is left behind, as long as there are others."""
        return self._config.on_worker_failure == "continue"

    def call(
        self,
        peers: list[Peer],
        call: Callable[[Peer], object],
        method: str,
        patience: Deadline,
        on_failure: Callable[[Peer], None] | None = None,
        blocks: bool = False,
    ) -> Calls:
        """Call workers of an update that may be cancelled; ``on_failure`` hears of no call but the latest.

        The other arguments are those of `Calls`.
        """
        this = self._latest = object()
        self._deadline = patience

        def failed(peer: Peer) -> None:
            with self._reacting:
                if on_failure is not None and self._latest is this:  # else an echo of what was given up already
                    on_failure(peer)

        calls = self._calls = Calls(peers, call, method, failed, patience, blocks, self._bell)
        if self.failed is not None:
            calls.cancel(self.failed)
        return calls

    def react(self, peer: Peer) -> None:
        """Tell the engine at once of a worker that failed to join or to update; callable from any thread."""
        if self.goes_on:
            self.engines.lose(peer.address)
        else:
            self.engines.abort()

    def refuse(self, reasons: Mapping[Peer, WeightTransferError | None], deadline: Deadline) -> Lost:
        """Have those workers give up that may not go on though they have not failed: that have a reason. Return it."""
        refused: Lost = {peer: reason for peer, reason in reasons.items() if reason is not None}
        if refused and self._may_lose:  # else all workers are to give up
            peers = [peer for peer in refused if hasattr(peer.channel, "abort_weight_update")]
            calls = self.call(peers, lambda peer: peer.abort(str(refused[peer])), "abort_weight_update", deadline)
            calls.wait(deadline)
        return refused

    def settle(self, failures: Lost) -> Lost:
        """Decide about workers that failed: raise the first error, or go on without them, as the config says.

        A trainer that was replaced never goes on.
        """
        others = any(peer.joined for peer in self.peers) or len(failures) < len(self.peers)
        cause = cause_of(failures)
        if cause is not None and (not self._may_lose or not others or isinstance(cause, ReplacedError)):
            raise cause
        for peer, error in failures.items():
            peer.forget()
            self.engines.lose(peer.address)
            logger.warning("going on without worker %s: %s", peer.address, error)
            self._tell(peer, error)
        return failures

    def _tell(self, peer: Peer, error: WeightTransferError | None) -> None:
        """Tell the listeners of a worker that has joined, or was lost."""
        workers = sum(peer.count for peer in self.peers if peer.joined)
        event = MembershipChanged(
            backend=self._config.backend,
            worker=peer.address,
            joined=peer.joined,
            workers=workers,
            error=None if error is None else str(error),
        )
        self._notify("weight_transfer_membership", event)

    def require_one(self, lost: Lost) -> None:
        """Raise the last failure if no worker is left: they may have failed one after another, in different phases."""
        if lost and not any(peer.joined for peer in self.peers):
            raise next(reversed(lost.values()))

    def cancel(self, reason: str) -> None:
        """Make what is under way raise soon; callable from any thread."""
        self.fail(TransferError(f"The update was aborted: {reason}."))

    def fail(self, error: WeightTransferError, after_others: bool = False) -> None:
        """Make what is under way raise an error soon; callable from any thread.

        Args:
            error: what happened.
            after_others: whether that may follow from what a worker has not told yet.
        """
        if self.failed is None or (self.failed_after_others and not after_others):
            self.failed, self.failed_after_others = error, after_others
        if self._calls is not None:
            self._calls.cancel(error)
        self.engines.abort()

    def go_on(self) -> None:
        """Forget that something was cancelled."""
        self.failed, self.failed_after_others = None, False

    def forget_echoes(self) -> None:
        """Forget what has failed only since an update was given up, which is begun anew; not that it was cancelled."""
        if self.failed_after_others:
            self.go_on()

    def require_going_on(self) -> None:
        """Raise if what is under way was cancelled."""
        if self.failed is not None:
            raise self.failed

    def abort(self, reason: str) -> None:
        """After a failure: all workers that were called, answered or not, leave this trainer, and join it next time.

        One that has not confirmed that soon after the deadline of the latest call is left to hear of it later.
        """
        with self._reacting:  # nobody reacts any more afterwards: that would hit the next update
            self._latest = self._calls = None
        for peer in self.peers:
            peer.turns.withdraw()
        self.engines.abort()
        called = [peer for peer in self.peers if peer.called and hasattr(peer.channel, "abort_weight_update")]
        calls = Calls(called, lambda peer: peer.abort(reason), "abort_weight_update", bell=self._bell)
        patience = max(min(ABORT_TIMEOUT, self._deadline.remaining()), _ABORT_GRACE)
        for peer, error in calls.wait(Deadline(patience)).items():
            if isinstance(error, ReplacedError):
                self.tenure.replaced = error
            elif not isinstance(error, SessionError):  # then it is another trainer's by now
                logger.warning("worker %s did not confirm the abort: %s", peer.address, error)
        if self.engines.own is not None:
            self.engines.own.release_source()
        if not self._rejoins:
            self.drop_engines()
        for peer in self.peers:
            peer.forget()

    def drop_engines(self) -> None:
        """Shut the engines down; all workers have to join new ones."""
        self.engines.drop()
        for peer in self.peers:
            peer.forget()

    def close(self) -> None:
        """Shut the engine down, and the channels that the sender made."""
        self.drop_engines()
        for peer in self.peers:
            peer.turns.withdraw()
            peer.close()
        self.peers, self._calls = [], None
        self._bell.close()
