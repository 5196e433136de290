"""The states of a worker's session: which call may run now, whose it is, and one at a time.


    created ──init──▶ ready ──start──▶ updating ──update, finish──▶ ready (new version)
       ▲                ▲                 │
       │                │                 ├─ refused before the engine began ─▶ ready (old version)
       │                └───────init──────┼─ failed or aborted before the first byte ─▶ created (old version)
       └─ aborted, left, or trainer gone ─┴─ failed or aborted after it ─▶ failed (no version)

In ``created`` and ``failed`` there is no engine; ``init_weight_transfer_engine`` and a full update lead out of both. A
`WeightSender` does that by itself at its next ``send``. A worker may be told to ``leave`` in any state but ``closed``:
it aborts what is open, whose ever it is, and lets go of the engine.

A trainer names its session when it initialises a worker. From then on the worker takes calls of that session only, so
that a trainer that was replaced can no longer start, load, publish or abort anything. It names its lease, too, and the
worker takes none that is older than the newest that it has seen. So a trainer that was replaced cannot come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from weight_transfer.config.structuring import brief
from weight_transfer.errors import LifecycleError, ReplacedError, SessionError, StaleCommitError
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.session.serving import Signal
    from weight_transfer.values.lease import Lease


class ReceiverState(StrEnum):
    """Where a receiver stands; see the drawing in this module."""

    CREATED = "created"
    READY = "ready"
    UPDATING = "updating"
    FAILED = "failed"
    CLOSED = "closed"


class Anyone(Enum):
    """Stands for a session where a call may come from any: the worker's own calls, and a new trainer's init."""

    ANYONE = "anyone"


ANYONE = Anyone.ANYONE
_GIVING_UP = "the end of an abandoned update"
_ADVICE = {
    ReceiverState.CREATED: "call init_weight_transfer_engine first",
    ReceiverState.READY: "call start_weight_update first",
    ReceiverState.UPDATING: "finish or abort the running update first",
    ReceiverState.FAILED: "the last update failed; call init_weight_transfer_engine and send a full update",
    ReceiverState.CLOSED: "create a new receiver",
}


class Lifecycle:
    """Where a receiver stands. All of it is guarded by ``changed``, which is notified of every change.

    Args:
        changed: the receiver's condition.
        timeout: seconds to wait for the end of an abandoned update.
        backend: for errors.

    Attributes:
        state: the state.
        session: the session of the trainer that initialised the receiver last; None for one without.
        lease: the newest that a trainer has come with; None as long as none had one.
        busy: the operation that is under way.
    """

    def __init__(self, changed: Signal, timeout: float, backend: str) -> None:
        self.state = ReceiverState.CREATED
        self.session: str | None = None
        self.lease: Lease | None = None
        self.busy: str | None = None
        self._changed = changed
        self._timeout = timeout
        self._backend = backend
        self._initialised = False

    def set(self, state: ReceiverState) -> None:
        """Enter a state."""
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def hand_to(self, session: str | None, lease: Lease | None) -> None:
        """Take calls of this session only, whose trainer has a lease, unless it knows of none.

        Raises:
            ReplacedError: there was a newer lease.
        """
        with self._changed:
            if lease is not None:
                if self.lease is not None and lease < self.lease:
                    raise self._replaced("init_weight_transfer_engine", f" from this one (lease {lease.number})")
                self.lease = lease
            self.session, self._initialised = session, True

    @contextmanager
    def operation(
        self, method: str, session: str | Anyone | None, *states: ReceiverState, waits: Deadline | None = None
    ) -> Iterator[None]:
        """Let one operation at a time run, of the right session, and in one of ``states`` only (none: in any).

        Args:
            method: for errors.
            session: whose call it is.
            states: in which it may run; none: in any.
            waits: until when to wait for a running operation, instead of refusing.

        Raises:
            ReplacedError: another trainer has taken the receiver over, before or in the middle of the operation.
        """
        with self._changed:
            self.require_open(method)
            self.require_session(method, session)
            if waits is not None or self.busy == _GIVING_UP:
                self._wait_until_idle(method, waits or Deadline(self._timeout))
            if self.busy:
                raise self.refusal(method, f"{self.busy} is under way")
            if states and self.state not in states:
                raise self.refusal(method, f"allowed in state {' or '.join(states)} only; {_ADVICE[self.state]}")
            self.busy, held = method, self.lease
        try:
            yield
        except Exception as error:
            if held is not None and self.lease is not None and held.holder != self.lease.holder:
                raise self._replaced(method) from error
            raise
        finally:
            self._set_idle()

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Keep other operations waiting while an abandoned update is ended; called by whoever saw that nobody is busy.

        The lock may be held when this begins; it need not be held inside.
        """
        with self._changed:
            self.busy = _GIVING_UP
        try:
            yield
        finally:
            self._set_idle()

    def require_open(self, method: str) -> None:
        """Refuse what comes after the end; closing twice is fine."""
        if self.state is ReceiverState.CLOSED and method != "close":
            raise self.refusal(method, "this receiver is closed; create a new one")

    def require_session(self, method: str, session: str | Anyone | None) -> None:
        """Refuse another trainer than the one that initialised the receiver last."""
        if session is ANYONE or session == self.session or not self._initialised:
            return
        if session is not None and self.lease is not None and not self.lease.owns(session):
            raise self._replaced(method)
        came = "without a session" if session is None else f"of session {session}"
        has = "has joined a trainer without one" if self.session is None else f"has joined session {self.session}"
        message = f"{method} {came} is refused: this worker {has}. A WeightSender joins it again at its next send."
        raise SessionError(message, method=method, state=str(self.state), backend=self._backend)

    def refusal(self, method: str, why: str) -> LifecycleError:
        """Return the error that says why ``method`` cannot be called now."""
        message = f"{method} cannot be called in state {self.state}: {why}."
        return LifecycleError(message, method=method, state=str(self.state))

    def stale_commit(self, update: str, arrived: str | None) -> StaleCommitError:
        """Return the error that says that an update cannot be published, since another one has arrived, or none."""
        method = "finish_weight_update"
        has = "no update waits for that here" if arrived is None else f"update {brief(arrived)} has arrived here"
        message = (
            f"{method} of update {brief(update)} is refused: {has}. It was published before, or given up; send again."
        )
        return StaleCommitError(message, method=method, state=str(self.state), backend=self._backend, update=update)

    def _replaced(self, method: str, whom: str = "") -> ReplacedError:
        number = self.lease.number if self.lease is not None else 0
        message = (
            f"{method} is refused: another trainer (lease {number}) has taken this worker over{whom}; create a new "
            "WeightSender to take it back."
        )
        return ReplacedError(message, method=method, state=str(self.state), backend=self._backend, lease=number)

    def _wait_until_idle(self, method: str, deadline: Deadline) -> None:
        while self.busy:
            if deadline.expired:
                raise deadline.timeout(f"{method} waited for {self.busy} to end", backend=self._backend)
            self._changed.wait(deadline.remaining())

    def _set_idle(self) -> None:
        with self._changed:
            self.busy = None
            self._changed.notify_all()
