"""The sender's workers as a whole: joined to the engine's group, started, finished, aborted, and counted when lost."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from weight_transfer.config.settings import RECEIVER
from weight_transfer.config.structuring import structure, unstructure
from weight_transfer.errors import (
    CommitError,
    ConfigError,
    ReplacedError,
    SessionError,
    TransferError,
    WeightTransferError,
)
from weight_transfer.model.dtypes import common_dtypes, dtypes_by_name
from weight_transfer.plugins.backend import Capability
from weight_transfer.session.calls import ABORT_TIMEOUT, Calls, Lost, cause_of, gone_in
from weight_transfer.session.engines import Engines
from weight_transfer.session.greeting import Greeting, require_distinct
from weight_transfer.session.peers import Peer, make_peer, make_slots
from weight_transfer.session.tenure import Tenure
from weight_transfer.session.waiting import logged_wait
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import MembershipChanged
from weight_transfer.values.versions import require_forward

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.control import ControlChannel
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.crew import Crew
    from weight_transfer.values.events import Version
    from weight_transfer.values.lease import Lease

logger = logging.getLogger(__name__)

_ABORT_GRACE = 0.3  # seconds that they get though the deadline has passed
_SAYING = 0.01  # seconds
_PATIENCE = 1.0  # seconds that a worker's earlier call may still take if the others need not wait for it

_ASKED: dict[str, object] = {
    "report_dtypes": None,
    "session": None,
    "trainer_ranks": 1,
    "ranks": [],
    "text_versions": False,
    "lease": None,
}
"""Keys of the init info that are left out unless they say something else: other systems' workers do not know them."""


def _says_nothing(key: str, value: object) -> bool:
    return key in _ASKED and (value == _ASKED[key] or not value)


def _version_in(status: dict[str, Any], target: str) -> object:
    """Return the last version of a target: published, or else served, as far as the status tells."""
    tables = [table for table in (status.get("committed"), status.get("versions")) if isinstance(table, dict)]
    found = (table[target] for table in tables if table.get(target) is not None)
    return next(found, None if tables else status.get("version"))


class Fleet:
    """The workers, and the trainer's engine that they have joined.

    Each phase returns the workers that it lost, or raises the first failure: ``on_worker_failure`` decides.

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
        self._numbers = itertools.count()
        self._config = config
        self._report_dtypes = {}
        if RECEIVER in config.cast.values():
            self._report_dtypes["report_dtypes"] = "checkpoint" if config.is_checkpoint_format else "kernel"
        self._rejoins = Capability.REJOIN in backend.backend.capabilities
        self._notify = backend.notify
        self.tenure = Tenure()
        self.failed: WeightTransferError | None = None
        self.failed_after_others = False
        self._calls: Calls | None = None
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

    @property
    def started(self) -> list[Peer]:
        """The workers on which the update is open."""
        return [peer for peer in self.peers if peer.started]

    def add(self, worker: str | ControlChannel, count: int) -> None:
        """Take in a control channel with ``count`` workers behind it; they join before the next update."""
        peer = make_peer(worker, next(self._numbers), count, self._config)
        peer.added = self.tenure.lease is not None
        for other in self.peers:
            if peer.address == other.address or peer.channel is other.channel:
                peer.close()
                raise ConfigError(f"Worker {other.address} is there already; name each worker once.")
        self.peers.append(peer)

    def remove(self, worker: str | ControlChannel) -> None:
        """Let go of a control channel. Ranks move up, so the others join a new group."""
        found = [peer for peer in self.peers if worker is peer.channel or peer.is_at(worker)]
        if not found:
            known = ", ".join(peer.address for peer in self.peers)
            raise ConfigError(f"There is no worker {worker}; there are {known}.")
        if len(self.peers) == 1:
            raise ConfigError(f"Worker {found[0].address} is the last one; close the sender instead.")
        self.drop_engines()
        self.peers.remove(found[0])
        found[0].close()

    def serve_with(self, crew: Crew) -> None:
        """Have engines on these trainer ranks; if there were others, all workers join anew."""
        if not self.engines.serve_with(crew):
            self.drop_engines()

    def require_generation(self, generations: Sequence[str | None]) -> None:
        """Join all workers anew if another trainer rank has lost its engine: another process has taken its place."""
        if not self.engines.are_those_of(generations):
            self.drop_engines()

    def place(self, device: str) -> None:
        """Have engines for weights on a torch device; if they have moved, all workers join anew."""
        if not self.engines.place(device):
            self.drop_engines()

    def join(self) -> Lost:
        """Join the workers that are not joined; all of them, if the backend cannot take in a single one."""
        if all(peer.joined for peer in self.peers):
            return {}
        deadline = Deadline(self._config.init_timeout)
        lost = self.greet(deadline)
        lease = self._take_lease(deadline, lost)
        present = [peer for peer in self.peers if peer not in lost]
        if not self._rejoins:
            self.drop_engines()
        joining = [peer for peer in present if not peer.joined]
        if not joining:
            return lost
        slots = make_slots(self.peers if self._rejoins else present)
        fields = self.engines.open([slots[peer] for peer in joining], deadline)
        assert self.engines.own is not None
        kind = self.engines.own.init_info_cls
        infos: dict[Peer, dict[str, Any]] = {}
        for peer, own in zip(joining, fields, strict=True):
            slot = slots[peer]
            peer.first_worker = slot.rank_offset - 1
            common: dict[str, Any] = {"rank_offset": slot.rank_offset, "world_size": slot.world_size}
            common |= {"timeout": max(deadline.remaining(), 1e-3), "text_versions": peer.text_versions}
            info = structure({**own, **common, **self._report_dtypes}, kind, "init_info")
            infos[peer] = {key: value for key, value in unstructure(info).items() if not _says_nothing(key, value)}
        session = self.tenure.next_session()
        method = "init_weight_transfer_engine"
        calls = self.call(joining, lambda peer: peer.join(infos[peer], session, lease), method, deadline, self.react)
        self.require_going_on()
        try:
            with logged_wait(lambda: f"waiting for {calls.silent or 'the engine'} in phase init"):
                self.engines.join(deadline)
        except WeightTransferError as error:
            cause = calls.explain(error)
            if not (calls.failures and self.goes_on):
                if cause is error:
                    raise
                raise cause from error
        lost |= self.settle(calls.wait(deadline))
        for peer in joining:
            peer.joined = peer not in lost
            peer.dtypes = dtypes_by_name(calls.results.get(peer), peer.address)
            if peer.joined:
                self._tell(peer, None)
        return lost

    def _take_lease(self, deadline: Deadline, lost: Lost) -> Lease:
        """Return this trainer's lease; if a worker was added that a newer one has used, all join under a new lease."""
        anew = self.tenure.ends_for(self.peers)
        if anew:
            self.drop_engines()
            lost |= self.greet(deadline)
        return self.tenure.take(self.peers, anew)

    def connect(self) -> None:
        """Join all workers, or leave none half joined."""
        try:
            self.require_one(self.join())
        except BaseException as error:
            self.abort(str(error) or type(error).__name__)
            cause = self.tenure.cause(error)
            if cause is error:
                raise
            raise cause from error

    def greet(self, deadline: Deadline) -> Lost:
        """Wait until the workers answer that have not, and learn from their status what they are.

        Raises:
            ReplacedError: another trainer has taken a worker over.
        """
        self.tenure.require()
        strangers = [peer for peer in self.peers if not (peer.joined or peer.greeted)]
        busy = all(peer.turns.busy for peer in self.peers)
        patience = Deadline(_PATIENCE) if self._may_lose and not busy else deadline
        greeting = Greeting(self._config.backend, deadline, self._may_ask_again)
        asked = self.call([peer for peer in strangers if peer.submits], Peer.ask_status, "status", patience)
        failures = greeting.take(asked.wait(deadline), asked.results)
        waiting = [peer for peer in strangers if not (peer.greeted or peer in failures)]
        failures |= greeting.explained(self.call(waiting, greeting, "status", patience, blocks=True).wait(deadline))
        lost = self.settle(failures)
        require_distinct(self.peers)
        return lost

    def _may_ask_again(self) -> bool:
        """Whether a worker that is not up is waited for; with ``"continue"``, only as long as no other one answers."""
        others = self._may_lose and any(peer.joined or peer.greeted for peer in self.peers)
        return not others and self.failed is None

    def versions(self, target: str) -> list[Version]:
        """Return the versions of ``target`` that the workers have; waits until they answer."""
        self.greet(Deadline(self._config.init_timeout))
        statuses = [peer.status for peer in self.peers if peer.greeted or peer.joined]
        served = [_version_in(status, target) for status in statuses]
        return [version for version in served if isinstance(version, (int, str))]

    def dtypes(self, called: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return the dtypes that the workers, which must have joined, have for weights of these names.

        Raises:
            HandshakeError: a worker does not know, lacks one, or differs from another; they are named.
        """
        return common_dtypes({peer.address: peer.dtypes for peer in self.peers if peer.joined}, called)

    @property
    def may_begin(self) -> bool:
        """Whether all workers take the start of an update and its weights in one call."""
        return all(peer.begins for peer in self.peers if peer.joined)

    def expect(self) -> None:
        """Let those that have joined prepare for an update while the trainer does.

        Whoever says that to them gets the interpreter for a moment: the trainer's look at its weights may not let go of
        it until it is over.
        """
        said = [peer.expect() for peer in self.peers]
        wait([each for each in said if each is not None], _SAYING)

    def begin(self) -> None:
        """Leave it to the call that brings the weights to open the update."""
        for peer in self.peers:
            peer.started = peer.joined

    def start(self, deadline: Deadline, replan: Callable[[Lost], object]) -> Lost:
        """Open the update; a worker that was restarted since the last one joins again first.

        Args:
            deadline: of the update.
            replan: called when workers have joined again, which may keep something else, or have other numbers.
        """
        lost: Lost = {}
        failures = self._start_joined(deadline)
        gone = gone_in(failures)
        lost |= self.settle({peer: error for peer, error in failures.items() if peer not in gone})
        if gone:
            for peer in gone:
                peer.forget()
            lost |= self.join()
            self.require_one(lost)
            replan(lost)
            lost |= self.settle(self._start_joined(deadline))
        return lost

    def _start_joined(self, deadline: Deadline) -> Lost:
        peers = [peer for peer in self.peers if peer.joined and not peer.started]
        failures = self.call(peers, lambda peer: peer.start(), "start_weight_update", deadline).wait(deadline)
        for peer in peers:
            peer.started = peer not in failures
        return failures

    def require_forward(self, target: str, version: Version) -> None:
        """Refuse a version that another trainer has brought a worker beyond, before any of them is touched.

        Raises:
            RollbackError: it has published a higher one.
        """
        for peer in self.peers:
            if peer.joined:
                require_forward(version, peer.committed.get(target), phase="init", peer=peer.address)

    def finish(self, version: Version, target: str, update: str | None, deadline: Deadline) -> Lost:
        """Have the version of ``target`` published that an update has brought: all workers have it now.

        Raises:
            CommitError: some have published it, and one failure is too many.
        """
        peers = self.started
        calls = self.call(peers, lambda peer: peer.finish(version, update), "finish_weight_update", deadline)
        try:
            lost = self.settle(calls.wait(deadline))
        except WeightTransferError as error:
            published = [peer.address for peer in peers if peer in calls.results]
            if not published or isinstance(error, ReplacedError):
                raise
            unpublished = [peer.address for peer in peers if peer not in calls.results]
            raise CommitError(
                f"Version {version!r} is served by {', '.join(published)}, but was not published by "
                f"{', '.join(unpublished)}; send again: that brings all to one version.",
                backend=self._config.backend,
                phase="finish",
                version=version,
                peer=getattr(error, "peer", None),
                cause=str(error),
                published=published,
                unpublished=unpublished,
            ) from error
        finally:
            for peer in peers:
                peer.started = False
                peer.committed.pop(target, None)
        return lost

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

    def react(self, peer: Peer) -> None:
        """Tell the engine at once of a worker that failed to join or to update; callable from any thread."""
        if self.goes_on:
            self.engines.lose(peer.address)
        else:
            self.engines.abort()

    def require_one(self, lost: Lost) -> None:
        """Raise the last failure if no worker is left: they may have failed one after another, in different phases."""
        if lost and not any(peer.joined for peer in self.peers):
            raise next(reversed(lost.values()))

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
        calls = Calls(called, lambda peer: peer.abort(reason), "abort_weight_update")
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

        calls = self._calls = Calls(peers, call, method, failed, patience, blocks)
        if self.failed is not None:
            calls.cancel(self.failed)
        return calls

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

    def require_going_on(self) -> None:
        """Raise if what is under way was cancelled."""
        if self.failed is not None:
            raise self.failed
