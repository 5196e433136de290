"""The sender's view of its workers: who they are, what they know, and calls to all of them at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.control.channel import ControlChannel
from weight_transfer.deadline import Deadline
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import TransferError, TransferTimeoutError, WeightTransferError

if TYPE_CHECKING:
    from weight_transfer.config import WeightTransferConfig

_GRACE = 0.5  # seconds


@attrs.define(eq=False)
class Peer:
    """One control channel and the workers behind it.

    Attributes:
        address: its URL, or ``worker 0`` for a channel without one.
        channel: the channel.
        count: workers behind it.
        owned: whether the sender made the channel, and closes it.
        joined: whether they have joined the engine's current group.
        started: whether an update is open on them.
        init_info: what they were sent to join.
        dtypes: of their weights by name, if they were asked and know.
        known: digest by field name of what they have been sent once.
    """

    address: str
    channel: ControlChannel
    count: int
    owned: bool = False
    joined: bool = False
    started: bool = False
    init_info: dict[str, Any] = attrs.field(factory=dict)
    dtypes: dict[str, str] | None = None
    known: dict[str, str] = attrs.field(factory=dict)

    def is_at(self, worker: object) -> bool:
        """Whether ``worker`` is this one's address."""
        return isinstance(worker, str) and worker.rstrip("/") == self.address

    def close(self) -> None:
        """Close the channel if the sender made it."""
        close = getattr(self.channel, "close", None)
        if self.owned and close is not None:
            close()

    def forget(self) -> None:
        """They have to join anew."""
        self.joined = self.started = False
        self.known = {}


def make_peer(worker: str | ControlChannel, index: int, count: int, config: WeightTransferConfig) -> Peer:
    """Return the peer of a worker; a URL becomes an HTTP channel.

    Args:
        worker: a URL or a control channel.
        index: its number, the name of a channel without an address.
        count: workers behind it.
        config: token and timeout of an HTTP channel.
    """
    channel: ControlChannel
    if isinstance(worker, str):
        from weight_transfer.control.http_client import HttpChannel

        channel = HttpChannel(worker, token=config.token, timeout=config.timeout)
    else:
        channel = worker
    address = getattr(channel, "address", None) or f"worker {index}"
    return Peer(str(address), channel, count, owned=channel is not worker)


def make_slots(peers: Sequence[Peer]) -> dict[Peer, WorkerSlot]:
    """Give each peer its place in a group of the trainer (rank 0) and these peers, in order."""
    world_size = 1 + sum(peer.count for peer in peers)
    slots, offset = {}, 1
    for peer in peers:
        slots[peer] = WorkerSlot(peer=peer.address, rank_offset=offset, count=peer.count, world_size=world_size)
        offset += peer.count
    return slots


class Calls:
    """The same call to several peers at once, each on a thread of its own.

    The threads are daemons: a channel that never returns costs a thread, not the trainer.

    Attributes:
        failures: the errors that are known so far.
        results: what the others returned.

    Args:
        peers: whom to call.
        call: what to call; its exceptions are collected.
        phase: for messages and for the ``phase`` of errors.
        on_failure: called at once, from the failing call's thread, with each peer that fails.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        call: Callable[[Peer], object],
        phase: str,
        on_failure: Callable[[Peer], None] | None = None,
    ) -> None:
        self._phase = phase
        self._on_failure = on_failure
        self._answers: queue.SimpleQueue[tuple[Peer, WeightTransferError | None]] = queue.SimpleQueue()
        self._pending = list(peers)
        self.failures: dict[Peer, WeightTransferError] = {}
        self.results: dict[Peer, object] = {}
        for peer in peers:
            name = f"weight-transfer {phase} {peer.address}"
            threading.Thread(target=self._run, args=(peer, call), name=name, daemon=True).start()

    def wait(self, deadline: Deadline) -> dict[Peer, WeightTransferError]:
        """Return the peers that failed, in the order of their failures; one that is late has failed too."""
        while self._pending:
            try:
                peer, error = self._answers.get(timeout=deadline.remaining())
            except queue.Empty:
                for late in self._pending:
                    what = f"waiting for the worker to answer in phase {self._phase}"
                    self.failures[late] = deadline.timeout(what, phase=self._phase, peer=late.address)
                break
            self._pending.remove(peer)
            if error is not None:
                self.failures[peer] = error
        return self.failures

    def explain(self, error: WeightTransferError) -> WeightTransferError:
        """Return what is behind an engine's ``error``: the first worker's failure; after a timeout, who is silent.

        Workers get a moment to answer. Those that waited for a silent one give up too, so their timeouts are echoes.
        """
        until = Deadline(_GRACE)
        first: WeightTransferError | None = next(iter(self.failures.values()), None)
        while self._pending and (first is None or isinstance(first, TransferTimeoutError)):
            try:
                peer, failure = self._answers.get(timeout=until.remaining())
            except queue.Empty:
                break
            self._pending.remove(peer)
            if failure is not None:
                self.failures[peer] = failure
                first = first or failure
        if self._pending and isinstance(first or error, TransferTimeoutError):
            silent = ", ".join(peer.address for peer in self._pending)
            message = f"{silent} did not answer in phase {self._phase} before the deadline."
            return TransferTimeoutError(message, phase=self._phase, peer=silent, cause=str(first or error))
        return first or error

    def _run(self, peer: Peer, call: Callable[[Peer], object]) -> None:
        error: WeightTransferError | None = None
        try:
            self.results[peer] = call(peer)
        except WeightTransferError as known:
            error = known
        except Exception as foreign:  # noqa: BLE001  (a channel of the user's own may raise anything; it is reported)
            cause = f"{type(foreign).__name__}: {foreign}"
            error = TransferError(f"The worker's control channel failed in phase {self._phase}.", cause=cause)
        if isinstance(error, TransferError):
            error.peer = error.peer or peer.address
            error.phase = error.phase or self._phase
        elif error is not None:
            error.message = f"{peer.address}: {error.message}"
        self._answers.put((peer, error))
        if error is not None and self._on_failure is not None:
            self._on_failure(peer)
