"""Rank 0's view of the trainer's other ranks: what they hold, orders to all of them at once, and how they fail.

A rank that has called ``send`` says that it is *ready*, and then does what rank 0 orders, until rank 0 tells it the
outcome of the update. Each order has one answer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import PeerLostError, TransferError, WeightTransferError, error_from_dict, error_to_dict
from weight_transfer.session.meeting import Meeting, name_of
from weight_transfer.values.deadline import LONG, Deadline

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.session.lines import Line, Message

logger = logging.getLogger(__name__)

_GOODBYE = 5.0  # seconds in which a rank takes the outcome of an update


class Crew:
    """The trainer's ranks beside rank 0; none, if it is alone.

    Args:
        config: the trainer's.
        key: under which the meeting is made known; see `next_key`.
        ranks: how many there are; rank 0 is this one.

    Attributes:
        size: trainer ranks, rank 0 included.
        on_failure: called from any thread with the error of a rank that fails while an update is under way, and whether
            that rank is gone.
    """

    def __init__(self, config: WeightTransferConfig, key: str, ranks: ParallelConfig) -> None:
        self.size = ranks.world_size
        self.on_failure: Callable[[WeightTransferError, bool], None] | None = None
        self._config = config
        self._lines: dict[int, Line] = {}
        self._heard: queue.SimpleQueue[tuple[object, int, Message | None]] = queue.SimpleQueue()
        self._present: dict[int, object] = {}
        self._owing: set[int] = set()
        self._lost: WeightTransferError | None = None
        self._losing = threading.Event()
        self._meeting = Meeting(self.size, key, config.rendezvous, config.token) if self.size > 1 else None

    def meet(self, deadline: Deadline) -> list[Message]:
        """Wait until every other rank is ready; return what each says, in the order of the ranks.

        Raises:
            TransferTimeoutError: a rank has not called ``send``; it is named.
            PeerLostError: a rank died.
        """
        if self._meeting is None:
            return []
        self._lost = None
        self._losing.clear()
        self._meeting.gather(self._lines, self._hearing, deadline)
        self._owing = set(self._lines)
        return self.answers("to send, too", deadline)

    def order(self, what: str, deadline: Deadline, **arguments: Any) -> None:
        """Have all other ranks do something; `answers` waits until they have done it."""
        self._owing = set(self._lines)
        message = {"do": what, "timeout": max(deadline.remaining(), 1e-3), **arguments}
        for line in self._lines.values():
            line.send(message, deadline)

    def answers(self, what: str, deadline: Deadline) -> list[Message]:
        """Return the answer of each other rank, in their order.

        Args:
            what: they do, for the message of a timeout.
            deadline: for all of them.

        Raises:
            WeightTransferError: a rank failed, died or is late; it is named.
        """
        found: dict[int, Message] = {}
        patience, told = Deadline(LONG), False
        while self._owing:
            try:
                left = deadline.remaining() if told else min(deadline.remaining(), patience.remaining())
                line, rank, message = self._heard.get(timeout=max(left, 1e-3))
            except queue.Empty:
                if not (told or deadline.expired):
                    told = True
                    logger.warning("waiting for %s %s", _names(self._owing), what)
                    continue
                names = _names(self._owing)
                raise deadline.timeout(f"waiting for {names} {what}", peer=names) from None
            if line is not self._present.get(rank):  # of one that has been replaced
                continue
            self._owing.discard(rank)
            error = _error_in(rank, message)
            if error is not None:
                raise error
            assert message is not None
            found[rank] = message
        return [found[rank] for rank in sorted(found)]

    def ask(self, what: str, doing: str, deadline: Deadline, **arguments: Any) -> list[Message]:
        """Order something, and return the answers."""
        self.order(what, deadline, **arguments)
        return self.answers(doing, deadline)

    def silent(self, deadline: Deadline) -> str:
        """Give the ranks until then to answer, well or not; return the names of those that do not."""
        while self._owing:
            try:
                line, rank, _ = self._heard.get(timeout=deadline.remaining())
            except queue.Empty:
                break
            if line is self._present.get(rank):
                self._owing.discard(rank)
        return _names(self._owing)

    def lost(self, patience: float) -> WeightTransferError | None:
        """Return the error of a rank that is gone, which may be noticed in a moment; None if all are there.

        Args:
            patience: seconds.
        """
        self._losing.wait(patience if self._lines else 0)
        return self._lost

    def lose_worker(self, peer: str) -> None:
        """Tell the engines of all other ranks that a worker failed and the others go on."""
        self._tell({"aside": "lose_worker", "peer": peer})

    def abort(self) -> None:
        """Make what the engines of all other ranks are doing raise soon; callable from any thread."""
        self._tell({"aside": "abort"})

    def end(self, report: dict[str, Any] | None, error: BaseException | None) -> None:
        """Tell all other ranks how the update ended; after an error they have to meet anew."""
        self.on_failure = None
        self._tell({"do": "end", "report": report, "error": error_to_dict(error) if error is not None else None})
        if error is not None:
            self._forget()

    def start_over(self, reason: str) -> None:
        """Have all other ranks send anew: they meet again."""
        self.on_failure = None
        self._tell({"do": "end", "anew": reason})
        self._forget()

    def close(self) -> None:
        """Let go of the ranks."""
        self._forget()
        if self._meeting is not None:
            self._meeting.close()

    def _tell(self, message: Message) -> None:
        for line in list(self._lines.values()):
            with suppress(TransferError):  # a rank that is gone need not know
                line.send(message, Deadline(_GOODBYE))

    def _forget(self) -> None:
        for line in self._lines.values():
            line.finish()
        self._lines, self._present, self._owing = {}, {}, set()

    def _hearing(self, rank: int) -> Callable[[Message | None], None]:
        line = self._present[rank] = object()

        def hear(message: Message | None) -> None:
            self._heard.put((line, rank, message))
            error = _error_in(rank, message)
            if error is None or self._present.get(rank) is not line:
                return
            if message is None:
                self._lost = self._lost or error
                self._losing.set()
            if self.on_failure is not None:
                self.on_failure(error, message is None)

        return hear


def _names(ranks: set[int]) -> str:
    return ", ".join(map(name_of, sorted(ranks)))


def _error_in(rank: int, message: Message | None) -> WeightTransferError | None:
    """Return the error of a rank that failed, with its name, or of one that is gone."""
    if message is None:
        return PeerLostError("It closed its connection or died.", peer=name_of(rank), phase="update")
    if not isinstance(message.get("error"), dict):
        return None
    error = error_from_dict(message["error"])
    if isinstance(error, TransferError):
        error.peer = name_of(rank) if error.peer in (None, "trainer") else error.peer
    else:
        error.message = f"{name_of(rank)}: {error.message}"
    return error
