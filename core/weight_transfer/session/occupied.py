"""What a worker has under way with its present trainer, and how that is given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from weight_transfer.config.structuring import structure
from weight_transfer.session.lifecycle import ANYONE, Anyone, Lifecycle, ReceiverState
from weight_transfer.session.serving import Served, Signal
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.lease import Lease

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.session.update import Update
    from weight_transfer.session.updating import Joined

_ABORT_INTERVAL = 0.2  # seconds


class Occupied:
    """The base of `WeightReceiver`: what is open with a trainer, whoever ends it.

    Args:
        config: the worker's.

    Attributes:
        config: the same.
    """

    def __init__(self, config: WeightTransferConfig) -> None:
        self.config = config
        self._changed = Signal()
        self._served = Served(self._changed)
        self._lifecycle = Lifecycle(self._changed, config.timeout, config.backend)
        self._timeout = config.timeout
        self._joined: Joined | None = None
        self._update: Update | None = None
        self._decided: tuple[str, str] | None = None  # the update that is to be published with its receipt's digest
        self._last_error: str | None = None

    def _make_way(self, init_info: dict[str, Any], lease: Lease | None) -> None:
        """End what is under way of another trainer than the one that joins; if that has a lease, it holds from now on.

        Raises:
            ReplacedError: there was a newer lease.
        """
        session, seconds = init_info.get("session"), init_info.get("timeout")
        with self._changed:
            another = session is not None and session != self._lifecycle.session
            held_up = self._lifecycle.busy is not None
            if lease is not None:
                self._lifecycle.hand_to(session, lease)
        if another and held_up:
            patience = min(self._timeout, seconds) if isinstance(seconds, (int, float)) else self._timeout
            reason = "another trainer has taken this worker over"
            self._abort("init_weight_transfer_engine", reason, ANYONE, Deadline(patience))

    def _abort(self, method: str, reason: str, session: str | Anyone | None, deadline: Deadline | None = None) -> None:
        """Give up what is under way, and leave the trainer; by default wait ``config.timeout`` seconds for that."""
        deadline = deadline or Deadline(self._timeout)
        while True:
            with self._changed:
                self._lifecycle.require_session(method, session)
                update, joined, busy = self._update, self._joined, self._lifecycle.busy
                if update is not None:
                    update.abort(reason)
                self._changed.notify_all()
            if busy not in ("init_weight_transfer_engine", "update_weights") or deadline.expired:
                break
            if joined is not None:  # else its engine is being made; it may also not have come to what is to be aborted
                joined.engine.abort_update()
            with self._changed:
                self._changed.wait_for(lambda: self._lifecycle.busy != busy, _ABORT_INTERVAL)  # noqa: B023  (called here)
        with self._operation(method, session, waits=deadline):
            if self._joined is joined:  # else the operation that was under way has let go of it
                self._leave(reason)

    def _leave(self, reason: str) -> None:
        """End what is open with the present trainer, and let go of its engine."""
        self._end_update(reason)
        self._drop_engine()
        if self._lifecycle.state is ReceiverState.READY:
            self._lifecycle.set(ReceiverState.CREATED)

    def _end_update(self, reason: str) -> None:
        """Leave the updating state after a failure: served as before if untouched, else no version."""
        update, joined = self._update, self._joined
        if update is None:
            return
        self._last_error = reason
        if update.complete:
            self._last_error += f" (version {update.version!r} had arrived, and was not published)"
        if update.begun and joined is not None:
            joined.tell_end(update, update.version, reason)
            self._drop_engine()
        update.give_up(reason)
        with self._changed:  # an abort that still sees the update waits for this
            self._update = None
            if update.touched:
                self._served.tear(update.target)
                self._lifecycle.set(ReceiverState.FAILED)
            else:
                self._served.resume()
                self._lifecycle.set(ReceiverState.CREATED if self._joined is None else ReceiverState.READY)

    def _drop_engine(self) -> None:
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.engine.shutdown()

    @contextmanager
    def _operation(
        self, method: str, session: str | Anyone | None, *states: ReceiverState, waits: Deadline | None = None
    ) -> Iterator[None]:
        self._give_up_if_abandoned()
        with self._lifecycle.operation(method, session, *states, waits=waits):
            yield

    def _abandoned(self) -> str | None:
        """Return why the present trainer will not go on, if that is so; None while it may."""
        with self._changed:
            if self._lifecycle.busy or self._joined is None:
                return None
            if self._joined.engine.lost:
                return "the trainer has closed its connection or died"
            if self._update is not None and self._update.deadline.expired:
                return "the trainer did not go on with the update within its deadline"
        return None

    def _give_up_on_thread(self) -> None:
        """Have it done for somebody who waits with a deadline: closing an engine may take a moment."""
        if self._abandoned():
            threading.Thread(target=self._give_up_if_abandoned, daemon=True).start()

    def _give_up_if_abandoned(self) -> None:
        """A trainer that died between two calls leaves an update open; the engine's notice or its deadline ends it."""
        if self._abandoned() is None:
            return
        with ExitStack() as stack:
            with self._changed:
                reason = self._abandoned()
                if reason is None or self._joined is None:
                    return
                stack.enter_context(self._lifecycle.giving_up())
            lost = self._joined.engine.lost
            self._end_update(reason)
            if lost:
                self._leave(reason)


def lease_in(init_info: dict[str, Any]) -> Lease | None:
    """Return the lease that an init info names.

    Raises:
        ConfigError: it is none.
    """
    data = init_info.get("lease")
    return None if data is None else structure(data, Lease, "init_info: lease")
