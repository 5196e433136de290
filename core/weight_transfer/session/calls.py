"""Calls to several workers at once, and what their failures mean together."""

from __future__ import annotations

import itertools
import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from weight_transfer.control.kept_threads import KeptThreads
from weight_transfer.errors import (
    LifecycleError,
    PeerLostError,
    ReplacedError,
    TransferError,
    TransferTimeoutError,
    WeightsMovedError,
    WeightTransferError,
    extract,
)
from weight_transfer.session.inbox import Bell, Inbox
from weight_transfer.session.peers import Peer
from weight_transfer.values.deadline import LONG, Deadline

logger = logging.getLogger(__name__)

ABORT_TIMEOUT = 10.0
"""Seconds that workers get at most to abort a failed update."""

_FEW = 8  # workers: their answers are read by whoever waits for them, those of more by the thread of the channels
_GRACE = 0.5  # seconds
_NAMED = 8  # workers in one message
_PHASES = {"status": "init", "weight_needs": "init", "begin_weight_update": "update"}
_LONG = ("init", "update")  # phases whose calls take longer than a round trip
_threads = KeptThreads("weight-transfer call")

Lost = dict[Peer, WeightTransferError]
"""Workers that failed, in the order of their failures."""

ECHOES = (PeerLostError, TransferTimeoutError)
"""What may follow from another member's failure."""


def cause_of(failures: Mapping[Peer, WeightTransferError]) -> WeightTransferError | None:
    """Return the failure that the others follow from: when one member fails, others lose it, or wait in vain.

    That another trainer has taken a worker over comes before all.
    """
    replaced = (error for error in failures.values() if isinstance(error, ReplacedError))
    own = (error for error in failures.values() if not isinstance(error, ECHOES))
    return next(itertools.chain(replaced, own, failures.values()), None)


def gone_in(failures: Lost) -> Lost:
    """Return those that are not there any more, or have left: they may join again, unless another trainer has them."""
    gone = (LifecycleError, PeerLostError)
    return {
        peer: error
        for peer, error in failures.items()
        if isinstance(error, gone) and not isinstance(error, ReplacedError)
    }


def refused_in(failures: Lost) -> LifecycleError | None:
    """Return the refusal of one that was to begin an update, and may join again; None if none was."""
    own = (error for error in gone_in(failures).values() if isinstance(error, LifecycleError))
    return next((error for error in own if error.method == "start_weight_update"), None)


def moved_in(failures: Lost) -> WeightsMovedError | None:
    """Return what one says whose weights have moved since the update began; None if none does."""
    return next((error for error in failures.values() if isinstance(error, WeightsMovedError)), None)


class Calls:
    """The same call to several peers at once.

    A channel that only has methods that block is called on a thread, which is a daemon: one that never returns costs a
    thread, not the trainer. Its next call waits for it.

    Attributes:
        failures: the errors that are known so far, in their order, but for those first whose channel is gone: what
            others say may follow from that.
        results: what the others returned.

    Args:
        peers: whom to call.
        call: what to call; its exceptions are collected. For a peer that `submits` it may return the result's future.
        method: the channel's method that it calls, for messages and for the ``phase`` of errors.
        on_failure: called at once, from another thread, with each peer that fails.
        patience: until when a call waits for an earlier one to the same channel to end; None for an abort, which may
            come while another call is under way.
        blocks: whether ``call`` waits, whatever the channel is.
        bell: wakes whoever waits.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        call: Callable[[Peer], object],
        method: str,
        on_failure: Callable[[Peer], None] | None = None,
        patience: Deadline | None = None,
        blocks: bool = False,
        bell: Bell | None = None,
    ) -> None:
        self._method = method
        self._phase = _PHASES.get(method, method.partition("_")[0])
        self._call = call
        self._on_failure = on_failure
        self._patience = patience
        self._tickets = {peer: peer.turns.ticket() for peer in peers}
        self._begun: set[Peer] = set()
        self._aborts: dict[Peer, Deadline] = {}
        self._answers: Inbox[tuple[Peer | None, WeightTransferError | None]] = Inbox(bell or Bell())
        self._pending = dict.fromkeys(peers)
        self._gone: set[Peer] = set()
        self.failures: dict[Peer, WeightTransferError] = {}
        self.results: dict[Peer, object] = {}
        for peer in peers:
            if blocks or not peer.submits or not self._submit(peer):
                _threads.run(partial(self._run, peer))

    def wait(self, deadline: Deadline) -> dict[Peer, WeightTransferError]:
        """Return the peers that failed, in the order of their failures; one that is late has failed too."""
        patience, told = Deadline(LONG), False
        while self._pending:
            left = deadline.remaining()
            try:
                self._take(left if told else min(left, patience.remaining()))
            except queue.Empty:
                if not told and not deadline.expired:
                    told = True
                    level = logging.INFO if self._phase == "update" else logging.WARNING
                    logger.log(level, "waiting for %s in phase %s", self.silent, self._phase)
                    continue
                for late in self._pending:
                    self.failures[late] = self._late(late, deadline)
                break
        return self.failures

    def _late(self, peer: Peer, deadline: Deadline) -> TransferTimeoutError:
        waits_for = peer.turns.late(deadline) if peer not in self._begun else None
        error = waits_for or deadline.timeout(f"waiting for the worker to answer in phase {self._phase}")
        error.phase, error.peer = self._phase, peer.address
        return error

    def explain(self, error: WeightTransferError) -> WeightTransferError:
        """Return what is behind an engine's ``error``: the first worker's failure; after a timeout, who is silent.

        Workers get a moment to answer; see `cause_of`.
        """
        until = Deadline(_GRACE)
        while self._pending and isinstance(cause_of(self.failures), (*ECHOES, type(None))):
            try:
                self._take(until.remaining(), heeds_cancel=False)
            except queue.Empty:
                break
        first = cause_of(self.failures)
        echoes = isinstance(error, TransferTimeoutError) and isinstance(first, ECHOES)  # it ended what they waited in
        if self._pending and (echoes or isinstance(first or error, TransferTimeoutError)):
            message = f"{self.silent} did not answer in phase {self._phase} before the deadline."
            return TransferTimeoutError(message, phase=self._phase, peer=self.silent, cause=str(first or error))
        return first or error

    def late(self, until: Deadline) -> Mapping[Peer, object]:
        """Return what those have answered that have not failed, whoever was still awaited when that was given up."""
        while self._pending:
            try:
                self._take(until.remaining(), heeds_cancel=False)
            except queue.Empty:
                break
        return {peer: self.results.get(peer) for peer in self.results if peer not in self.failures}

    def cancel(self, error: WeightTransferError) -> None:
        """Make whoever waits raise ``error``; callable from any thread."""
        self._answers.put((None, error))

    @property
    def silent(self) -> str:
        """The addresses of those that have not answered yet; of many the first."""
        some = [peer.address for peer in itertools.islice(self._pending, _NAMED)]
        more = len(self._pending) - len(some)
        return ", ".join(some) + (f" and {more} more" if more else "")

    def _take(self, timeout: float, heeds_cancel: bool = True) -> None:
        """Wait for one answer."""
        wires = [peer.wire for peer in self._pending] if len(self._pending) <= _FEW else []
        is_short = self._phase not in _LONG
        peer, error = self._answers.get(timeout, [wire for wire in wires if wire is not None], eager=is_short)
        if peer is None:
            if not heeds_cancel:
                return
            assert error is not None
            raise error
        del self._pending[peer]
        if error is not None:
            self.failures = {peer: error, **self.failures} if peer in self._gone else {**self.failures, peer: error}

    def _submit(self, peer: Peer) -> bool:
        """Call without a thread; return False if that has to wait for an earlier call."""
        try:
            if not self._take_turn(peer):
                return False
        except TransferError as error:
            self._tell(peer, error)
            return True
        self._begun.add(peer)
        answer: Future[object] = Future()
        try:
            outcome = self._call(peer)
            if isinstance(outcome, Future):
                answer = outcome
            else:
                answer.set_result(outcome)
        except Exception as error:  # noqa: BLE001  (collected)
            answer.set_exception(error)
        except BaseException as error:  # Ctrl-C: it is for the caller, whatever becomes of the worker
            answer.set_exception(error)
            raise
        finally:
            answer.add_done_callback(partial(self._end, peer))
        return True

    def _end(self, peer: Peer, answer: Future[object]) -> None:
        """Take the outcome of a call that was submitted, on whichever thread knows it first."""
        self._give_turn_back(peer)
        error = answer.exception()
        if error is None:
            self.results[peer] = answer.result()
        self._tell(peer, error)

    def _run(self, peer: Peer) -> None:
        error: BaseException | None = None
        try:
            with self._turn(peer):
                self._begun.add(peer)
                outcome = self._call(peer)
                self.results[peer] = outcome.result() if isinstance(outcome, Future) else outcome
        except BaseException as failed:  # noqa: BLE001  (a channel of the user's own may raise anything; it is reported)
            error = failed
        self._tell(peer, error)

    @contextmanager
    def _turn(self, peer: Peer) -> Iterator[None]:
        if self._patience is not None:
            with peer.turns.taken(self._method, self._tickets[peer], self._patience):
                yield
            return
        self._take_turn(peer)
        try:
            yield
        finally:
            self._give_turn_back(peer)

    def _take_turn(self, peer: Peer) -> bool:
        """Take the turn if that needs no wait, and return whether it was taken.

        Where an abort names no session, the next call waits for it a while: it would end what that one begins.
        """
        if self._patience is not None:
            return peer.turns.take(self._method, self._tickets[peer])
        if peer.session is None:
            self._aborts[peer] = peer.turns.begin_abort(ABORT_TIMEOUT)
        return True

    def _give_turn_back(self, peer: Peer) -> None:
        if self._patience is not None:
            peer.turns.give_back()
        elif peer in self._aborts:
            peer.turns.end_abort(self._aborts.pop(peer))

    def _tell(self, peer: Peer, error: BaseException | None) -> None:
        known = None if error is None else self._named(peer, error)
        self._answers.put((peer, known))
        if known is not None and self._on_failure is not None:
            _threads.run(partial(self._on_failure, peer))

    def _named(self, peer: Peer, error: BaseException) -> WeightTransferError:
        """Give an error its context, and a foreign exception its place in the tree."""
        if isinstance(error, WeightTransferError):
            known = error
        else:
            cause = f"{type(error).__name__}: {error}"
            message = f"The worker's control channel failed in phase {self._phase}."
            known = extract(cause) or TransferError(message, cause=cause)
        if isinstance(known, PeerLostError) and known.peer == peer.address:  # by its channel: a worker knows no address
            self._gone.add(peer)
        if isinstance(known, TransferError):
            known.peer = known.peer or peer.address
            known.phase = known.phase or self._phase
        else:
            known.message = f"{peer.address}: {known.message}"
        return known
