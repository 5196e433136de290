"""The sender's view of its workers: who they are, what they know, and calls to all of them at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.control.channel import ControlChannel, takes_session
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
    extract,
)
from weight_transfer.model.manifest import Manifest
from weight_transfer.plan.layout import Regions
from weight_transfer.session.sharing import Keeper
from weight_transfer.session.turns import Turns
from weight_transfer.values.deadline import LONG, Deadline

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.values.events import Version

logger = logging.getLogger(__name__)

_GRACE = 0.5  # seconds
_PHASES = {"status": "init", "weight_needs": "init"}
_METHODS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


@attrs.define(eq=False)
class Peer:
    """One control channel and the workers behind it.

    Attributes:
        address: its URL, or ``worker 0`` for a channel without one.
        channel: the channel.
        count: workers behind it.
        owned: whether the sender made the channel, and closes it.
        joined: whether they have joined the engine's current group.
        called: whether they were told of this trainer since they were last forgotten: then they must hear of an abort.
        started: whether an update is open on them.
        greeted: whether they have answered.
        status: what they answered; empty for a channel, or a server, without ``status``.
        session: by what they know this trainer, if the channel carries sessions.
        init_info: what they were sent to join.
        dtypes: of their weights by name, if they were asked and know.
        known: digest by field name of what they have been sent once, by target.
        first_worker: number of the first of them among all workers.
        kept: by target, the manifest of which they were asked what they keep, and what they answered.
        turns: of the calls to the channel.
    """

    address: str
    channel: ControlChannel
    count: int
    owned: bool = False
    joined: bool = False
    called: bool = False
    started: bool = False
    greeted: bool = False
    status: dict[str, Any] = attrs.field(factory=dict)
    session: str | None = None
    init_info: dict[str, Any] = attrs.field(factory=dict)
    dtypes: dict[str, str] | None = None
    known: dict[str, dict[str, str]] = attrs.field(factory=dict)
    first_worker: int = 0
    kept: dict[str, tuple[Manifest, list[Keeper]]] = attrs.field(factory=dict)
    turns: Turns = attrs.field(factory=Turns)

    @property
    def ids(self) -> set[str]:
        """The receivers behind it, as far as they tell."""
        return {part for part in str(self.status.get("id") or "").split(",") if part}

    @property
    def text_versions(self) -> bool:
        """Whether the channel wants versions as text."""
        return getattr(self.channel, "text_versions", False) is True

    def join(self, init_info: dict[str, Any], session: str) -> object:
        """Have them join; from then on the session goes with each call, if the channel carries sessions."""
        self.session = session if takes_session(self.channel) else None
        self.called = True
        self.init_info = init_info | self._session
        return self.channel.init_weight_transfer_engine(self.init_info)

    def needs(self, request: dict[str, Any], manifest: Manifest) -> object:
        """Ask what they keep of the weights of a manifest, which they then know; None says that they were not asked."""
        self.called = True
        target = request["target"]
        sent: dict[str, Any] = {"digest": manifest.digest}
        if self.known.get(target, {}).get("manifest") != manifest.digest:
            sent["value"] = manifest.to_wire()
        call: Callable[..., Any] = self.channel.weight_needs  # type: ignore[attr-defined]  # it was looked for
        answer = call({**request, "manifest": sent} | self._session)
        if answer is not None:
            self.known.setdefault(target, {})["manifest"] = manifest.digest
        return answer

    def keep(self, target: str, manifest: Manifest, answer: object) -> None:
        """Take down what they keep; ``answer`` is None for a channel that cannot be asked.

        Raises:
            HandshakeError: the answer is none.
        """
        needs = answer.get("needs") if isinstance(answer, dict) else [None] * self.count
        if not isinstance(needs, list) or len(needs) != self.count:
            raise HandshakeError(
                f"It answered what it keeps for {len(needs) if isinstance(needs, list) else 'no'} workers, and has "
                f"{self.count} behind it.",
                peer=self.address,
                phase="init",
            )
        regions = [None if need is None else Regions.from_wire(need, manifest) for need in needs]
        keepers = [Keeper(self.address, self.first_worker + index, kept) for index, kept in enumerate(regions)]
        self.kept[target] = manifest, keepers

    def start(self) -> None:
        """Open an update."""
        self.called = True
        call: Callable[..., None] = self.channel.start_weight_update
        call(**self._session)

    def update(self, info: dict[str, Any]) -> object:
        """Have them receive."""
        return self.channel.update_weights(info | self._session)

    def finish(self, version: Version) -> None:
        """Have them publish."""
        call: Callable[..., None] = self.channel.finish_weight_update
        call(str(version) if self.text_versions else version, **self._session)

    def abort(self, reason: str) -> None:
        """Have them give up."""
        call: Callable[..., None] = self.channel.abort_weight_update
        call(reason, **self._session)

    @property
    def _session(self) -> dict[str, Any]:
        return {} if self.session is None else {"session": self.session}

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
        self.joined = self.called = self.started = self.greeted = False
        self.known, self.kept = {}, {}


def make_peer(worker: str | ControlChannel, index: int, count: int, config: WeightTransferConfig) -> Peer:
    """Return the peer of a worker; a URL becomes an HTTP channel.

    Args:
        worker: a URL or a control channel.
        index: its number, the name of a channel without an address.
        count: workers behind it, unless its attribute ``workers`` says otherwise.
        config: token and timeouts of an HTTP channel.

    Raises:
        ConfigError: it is neither, or there is no worker behind it.
    """
    channel: ControlChannel
    if isinstance(worker, str):
        from weight_transfer.control.http_client import HttpChannel

        channel = HttpChannel(
            worker,
            token=config.token,
            timeout=config.timeout,
            status_timeout=min(config.timeout, config.init_timeout),
            connect_timeout=min(5.0, config.init_timeout / 2),
        )
    elif all(callable(getattr(worker, method, None)) for method in _METHODS):
        channel = worker
    else:
        raise ConfigError(
            f"{worker!r} is no worker; give its URL, such as 'http://127.0.0.1:8001', a WeightReceiver, or a control "
            "channel."
        )
    address = getattr(channel, "address", None) or f"worker {index}"
    own = getattr(channel, "workers", None)
    if isinstance(own, int) and not isinstance(own, bool):  # else it is something of its own
        count = own
    if count < 1:
        raise ConfigError(
            f"{count} workers cannot be behind {address}; workers_per_channel, or its attribute workers, is 1 or more."
        )
    return Peer(str(address), channel, count, owned=channel is not worker)


def make_slots(peers: Sequence[Peer]) -> dict[Peer, WorkerSlot]:
    """Give each peer its place in a group of the trainer (rank 0) and these peers, in order."""
    world_size = 1 + sum(peer.count for peer in peers)
    slots, offset = {}, 1
    for peer in peers:
        slots[peer] = WorkerSlot(peer=peer.address, rank_offset=offset, count=peer.count, world_size=world_size)
        offset += peer.count
    return slots


Lost = dict[Peer, WeightTransferError]
"""Workers that failed, in the order of their failures."""

ECHOES = (PeerLostError, TransferTimeoutError)
"""What may follow from another member's failure."""


def cause_of(failures: Mapping[Peer, WeightTransferError]) -> WeightTransferError | None:
    """Return the failure that the others follow from: when one member fails, others lose it, or wait in vain."""
    own = (error for error in failures.values() if not isinstance(error, ECHOES))
    return next(own, next(iter(failures.values()), None))


def gone_in(failures: Lost) -> Lost:
    """Return those that are not there any more, or have joined another trainer: they may join again."""
    return {peer: error for peer, error in failures.items() if isinstance(error, (LifecycleError, PeerLostError))}


class Calls:
    """The same call to several peers at once, each on a thread of its own.

    The threads are daemons: a channel that never returns costs a thread, not the trainer. Its next call waits for it.

    Attributes:
        failures: the errors that are known so far.
        results: what the others returned.

    Args:
        peers: whom to call.
        call: what to call; its exceptions are collected.
        method: the channel's method that it calls, for messages and for the ``phase`` of errors.
        on_failure: called at once, from the failing call's thread, with each peer that fails.
        patience: until when a call waits for an earlier one to the same channel to end; None for an abort, which may
            come while another call is under way.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        call: Callable[[Peer], object],
        method: str,
        on_failure: Callable[[Peer], None] | None = None,
        patience: Deadline | None = None,
    ) -> None:
        self._method = method
        self._phase = _PHASES.get(method, method.partition("_")[0])
        self._on_failure = on_failure
        self._patience = patience
        self._tickets = {peer: peer.turns.ticket() for peer in peers}
        self._begun: set[Peer] = set()
        self._answers: queue.SimpleQueue[tuple[Peer | None, WeightTransferError | None]] = queue.SimpleQueue()
        self._pending = list(peers)
        self.failures: dict[Peer, WeightTransferError] = {}
        self.results: dict[Peer, object] = {}
        for peer in peers:
            name = f"weight-transfer {self._phase} {peer.address}"
            threading.Thread(target=self._run, args=(peer, call), name=name, daemon=True).start()

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
        if self._pending and isinstance(first or error, TransferTimeoutError):
            message = f"{self.silent} did not answer in phase {self._phase} before the deadline."
            return TransferTimeoutError(message, phase=self._phase, peer=self.silent, cause=str(first or error))
        return first or error

    def cancel(self, error: WeightTransferError) -> None:
        """Make whoever waits raise ``error``; callable from any thread."""
        self._answers.put((None, error))

    @property
    def silent(self) -> str:
        """The addresses of those that have not answered yet."""
        return ", ".join(peer.address for peer in self._pending)

    def _take(self, timeout: float, heeds_cancel: bool = True) -> None:
        """Wait for one answer."""
        peer, error = self._answers.get(timeout=timeout)
        if peer is None:
            if not heeds_cancel:
                return
            assert error is not None
            raise error
        self._pending.remove(peer)
        if error is not None:
            self.failures[peer] = error

    def _turn(self, peer: Peer) -> AbstractContextManager[None]:
        if self._patience is None:
            return nullcontext()
        return peer.turns.taken(self._method, self._tickets[peer], self._patience)

    def _run(self, peer: Peer, call: Callable[[Peer], object]) -> None:
        error: WeightTransferError | None = None
        try:
            with self._turn(peer):
                self._begun.add(peer)
                self.results[peer] = call(peer)
        except WeightTransferError as known:
            error = known
        except BaseException as foreign:  # noqa: BLE001  (a channel of the user's own may raise anything; it is reported)
            cause = f"{type(foreign).__name__}: {foreign}"
            message = f"The worker's control channel failed in phase {self._phase}."
            error = extract(cause) or TransferError(message, cause=cause)
        if isinstance(error, TransferError):
            error.peer = error.peer or peer.address
            error.phase = error.phase or self._phase
        elif error is not None:
            error.message = f"{peer.address}: {error.message}"
        self._answers.put((peer, error))
        if error is not None and self._on_failure is not None:
            self._on_failure(peer)
