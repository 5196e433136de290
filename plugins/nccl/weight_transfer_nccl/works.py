"""Operations of torch.distributed under way, and its errors in our words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import PeerLostError, TransferError
from weight_transfer_nccl.rendezvous import first_line

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

MARGIN = 0.01  # seconds by which gloo's timeout, in whole milliseconds, comes after the deadline
_LOOK = timedelta(seconds=0.1)  # between two looks at whether operations were given up


class Work:
    """Operations under way.

    It can let go of torch's own objects, which keep gloo's connections open as long as anything refers to them, be it
    the frames of a traceback.

    Args:
        deadline: when they must have ended.
        doing: for messages.
        timed: whether each ends by the timeout with which it is waited for: gloo's sends and receives.
        given_up: set once nobody needs their end any more, if they only read what they are given, as gloo's broadcasts
            do on a trainer: gloo does not notice all writes that fail, and would wait until its timeout.
    """

    def __init__(
        self, deadline: Deadline, doing: str, timed: bool = False, given_up: threading.Event | None = None
    ) -> None:
        self._works: list[Any] | None = []
        self._deadline = deadline
        self._doing = doing
        self._timed = timed
        self._given_up = given_up

    def add(self, work: Any) -> None:
        """Add one more."""
        if self._works is not None:
            self._works.append(work)

    def wait(self) -> None:
        """Wait for their end: on the host for gloo, on the current stream for NCCL.

        Raises:
            TransferTimeoutError: the deadline passed.
            PeerLostError: a member of the group died, or the group was aborted.
        """
        if self._works is None:
            raise aborted(self._deadline, self._doing)
        with errors_of_torch(self._deadline, self._doing):
            while self._works:  # no name for a work: a traceback would keep it
                if self._given_up is None:
                    self._works[0].wait(*self._timeout())
                else:
                    self._await_first(self._given_up)
                del self._works[0]  # gloo's sends and receives can be waited for once

    def drain(self) -> None:
        """Wait until each has ended, well or not, and forget them; those that only read need not end."""
        works, self._works = self._works or [], None
        for work in works if self._given_up is None else ():
            with suppress(RuntimeError):  # gloo: each operation ends by its own timeout at the latest
                work.wait(*self._timeout())

    def _await_first(self, given_up: threading.Event) -> None:
        assert self._works
        while not self._works[0].is_completed():
            with suppress(RuntimeError):  # this look is over, or it has failed, which the last line raises
                self._works[0].wait(_LOOK)
            if given_up.is_set():
                raise aborted(self._deadline, self._doing)
        self._works[0].wait()

    def _timeout(self) -> tuple[timedelta, ...]:
        return (timedelta(seconds=self._deadline.remaining() + MARGIN),) if self._timed else ()


@contextmanager
def errors_of_torch(deadline: Deadline, doing: str) -> Iterator[None]:
    """Map the errors of torch.distributed, whose operations are all that may stand inside."""
    try:
        yield
    except RuntimeError as error:
        if deadline.expired:
            raise deadline.timeout(doing, backend="nccl", phase="update") from error
        message = f"A member of the group died or closed its connection while {doing}."
        raise PeerLostError(message, backend="nccl", phase="update", cause=first_line(error)) from error


def aborted(deadline: Deadline, doing: str) -> TransferError:
    """Return the error of a group that was aborted, be it by its deadline."""
    if deadline.expired:
        return deadline.timeout(doing, backend="nccl", phase="update")
    return PeerLostError("The communicator was aborted.", backend="nccl", phase="update")
