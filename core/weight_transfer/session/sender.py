"""The trainer's session: brings every worker to a new version, or says which one failed and why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import CommitError, ConfigError, LifecycleError, TransferError
from weight_transfer.model.autograd_modes import reading
from weight_transfer.model.info import MODEL
from weight_transfer.plugins.manager import add_observers, load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.session import background
from weight_transfer.session.configured_cast import ConfiguredCast
from weight_transfer.session.crew import Crew
from weight_transfer.session.fleet import Fleet
from weight_transfer.session.following import Follower
from weight_transfer.session.leading import Leader
from weight_transfer.session.meeting import next_key
from weight_transfer.session.outgoing import MANY, Outgoing
from weight_transfer.session.part import Part, StartOver
from weight_transfer.session.ranks import ALONE, detected_ranks, ranks_of
from weight_transfer.values.versions import as_version, following

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.control import ControlChannel
    from weight_transfer.model.source import WeightSource
    from weight_transfer.values.events import Version
    from weight_transfer.values.report import TransferReport

logger = logging.getLogger(__name__)


class WeightSender:
    """Sends weight versions to all workers. Use it as a context manager, or call `close`.

    Args:
        config: anything that `load_config` takes.
        workers: a control channel per worker or replica: a URL, a `WeightReceiver` of this
            process, or any object with the methods of `ControlChannel`.
        parallel_config: this process's rank among the trainer's ranks. All ranks construct a sender and call
            `send`; each gives its own shards if the backend moves regions, and rank 0 alone talks to the workers. By
            default each process sends by itself, except that weights which are sharded over ranks are sent by all ranks
            of torch.distributed's default group.
        workers_per_channel: workers behind each channel, for channels that have neither a ``status`` that tells nor an
            attribute ``workers``.
        observers: objects with hook implementations, beside the ones that the config names.

    Raises:
        ConfigError: a config key is wrong, or there is no worker.
    """

    def __init__(
        self,
        config: Any,
        workers: Sequence[str | ControlChannel],
        *,
        parallel_config: ParallelConfig | None = None,
        workers_per_channel: int = 1,
        observers: tuple[object, ...] = (),
    ) -> None:
        self.config: WeightTransferConfig = load_config(config)
        self.parallel_config = parallel_config
        self._backend = load_backend(self.config.backend)
        add_observers(self._backend, self.config.observers, observers)
        if isinstance(workers, str) or not workers:
            raise ConfigError('WeightSender needs a list of workers, as in workers=["http://127.0.0.1:8001"].')
        self._workers_per_channel = workers_per_channel
        self._fleet = Fleet(self._backend, self.config, parallel_config or ALONE)
        for worker in workers if self._may_send else ():
            self._fleet.add(worker, workers_per_channel)
        self._cast = ConfiguredCast(self.config.cast, self._fleet, self._sends)
        self._targets: dict[str, Outgoing] = {}
        self._role: tuple[ParallelConfig, Leader | Follower] | None = None
        self._key: str | None = None
        self._exclusive = threading.Lock()
        self._closed = False

    @property
    def version(self) -> Version | None:
        """The last version of the model that `send` brought to the workers."""
        return self._targets[MODEL].version if MODEL in self._targets else None

    def connect(self) -> None:
        """Join all workers now; `send` does it by itself. Waits for workers that are not up yet.

        A trainer of several ranks leaves it to `send` with a backend that moves regions, since all ranks are joined; so
        does a rank other than the first.

        Raises:
            PeerLostError: a worker did not answer within ``config.init_timeout`` seconds.
            HandshakeError: a worker has another backend, or refuses the token.
        """
        with self._operation("connect"):
            ranks = self.parallel_config or detected_ranks()
            if ranks.rank == 0 and (ranks.world_size == 1 or not self._fleet.engines.by_region):
                self._fleet.connect()

    def send(
        self,
        weights: nn.Module | WeightSource,
        version: Version | None = None,
        *,
        target: str = MODEL,
        only: Sequence[str] | None = None,
        allow_rollback: bool = False,
    ) -> TransferReport:
        """Bring all workers to these weights. The weights may change as soon as this returns.

        Args:
            weights: the model, or a source. Every trainer rank passes its own shards of the same model.
            version: the new version: a whole number or a name, the same on all ranks; default is the last one plus 1,
                at first the highest that the workers serve plus 1.
            target: which of the receivers' models these weights are for; see ``targets`` of `WeightReceiver`.
            only: names or glob patterns of the weights to send; the workers keep the others, of the version that this
                sender has sent before, and the new version covers all of them.
            allow_rollback: whether ``version`` may be a lower number than the last one that a worker has published; the
                same on all ranks.

        Returns:
            What was sent, to whom and how fast; the same on every trainer rank.

        Raises:
            TransferError: the update failed; ``peer`` names the worker or the trainer rank. No worker publishes the
                version (but one that cannot be reached any more may have), and the next ``send`` joins all of them
                again. All trainer ranks raise the same. With ``on_worker_failure = "continue"`` only if it failed on
                all.
            CommitError: all workers had received the version, which decides it, but not all have published it. Those in
                ``published`` serve it, and `version` is the new one. Not with ``"continue"``: then the others are in
                the report's ``lost``.
            RollbackError: a worker has published a higher version; nothing was changed.
            ReplacedError: a newer sender has taken a worker over, whatever ``on_worker_failure`` says. This one is
                refused from now on; a new one takes the workers back.
        """
        with self._operation("send"):
            outgoing = self._targets.setdefault(target, Outgoing(target))
            whole = outgoing.whole(weights)
            with outgoing.recalling(whole, only is None):
                try:
                    return self._send(whole, outgoing, version, only, allow_rollback)
                except StartOver as reason:
                    logger.info("beginning anew: %s", reason)
            try:
                return self._send(whole, outgoing, version, only, allow_rollback)
            except StartOver as reason:
                message = f"The update was given up, and so was another one in its place: {reason}."
                raise TransferError(message, backend=self.config.backend, phase="update") from reason

    def _send(
        self,
        whole: WeightSource,
        outgoing: Outgoing,
        version: Version | None,
        only: Sequence[str] | None,
        allow_rollback: bool,
    ) -> TransferReport:
        """Send once.

        Raises:
            StartOver: all ranks have to send anew, with all that a source says read anew.
        """
        if outgoing.params >= MANY * len(self._fleet.peers) and not (outgoing.blindly and only is None):
            self._fleet.expect()  # first of all: they look at their weights while this side does
        first = None if self.parallel_config is not None else whole.manifest()  # it knows then whether it is sharded
        ranks = self.parallel_config or ranks_of(whole)
        role = self._role_of(ranks)

        def prepare() -> Part:
            read = whole.manifest() if first is None else first
            source = outgoing.part(self._cast.around(whole, outgoing), only)
            manifest = read if source is whole else source.manifest()
            outgoing.require_base(manifest)
            if not manifest.params and source.whole:
                raise ConfigError("The weights to send have no parameters.")
            shards = outgoing.shards(ranks.rank, ranks.device or source.device)
            regions = shards.read(source, manifest) if self._by_region else None
            called = as_version(version) if version is not None else None
            some = tuple(only) if only is not None else None
            return Part(
                self.config,
                outgoing.target,
                called,
                some,
                allow_rollback,
                read,
                source,
                manifest,
                shards,
                regions,
                outgoing.recalled,
            )

        try:
            if isinstance(role, Follower):
                report = role.send(prepare)
            else:
                report = role.send(prepare, outgoing, lambda: self._next(version, outgoing))
        except CommitError as error:
            outgoing.version = error.version
            raise
        outgoing.version, outgoing.params = report.version, report.params
        return report

    async def asend(
        self,
        weights: nn.Module | WeightSource,
        version: Version | None = None,
        *,
        target: str = MODEL,
        only: Sequence[str] | None = None,
        allow_rollback: bool = False,
    ) -> TransferReport:
        """`send` for asyncio: the event loop goes on meanwhile.

        A task that is cancelled in it aborts the update on all workers, and ends once nothing reads the weights any
        more.
        """
        return await background.finished(
            lambda: self.send(weights, version, target=target, only=only, allow_rollback=allow_rollback),
            "weight-transfer send",
            self._cancel,
        )

    def add_worker(self, worker: str | ControlChannel) -> None:
        """Send to one more worker or replica, from the next `send` on.

        If another trainer has used it since this one began, that `send` takes it over, as a new sender would; then all
        workers join again.

        Raises:
            ConfigError: a worker of that address is there already.
        """
        with self._operation("add_worker"):
            if self._may_send:
                self._fleet.add(worker, self._workers_per_channel)

    def remove_worker(self, worker: str | ControlChannel) -> None:
        """Send to this worker no more; it keeps its version. The others join again at the next `send`.

        Raises:
            ConfigError: there is no such worker, or it is the last one.
        """
        with self._operation("remove_worker"):
            if self._may_send:
                self._fleet.remove(worker)

    def close(self) -> None:
        """Shut the engine and the channels down, and let go of the weights. The workers keep serving their version."""
        self._closed = True
        self._fleet.close()
        if self._role is not None:
            self._role[1].close()
        for outgoing in self._targets.values():
            outgoing.forget()

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> WeightSender:
        return self

    async def __aexit__(self, *_: object) -> None:
        await background.start(self.close, "weight-transfer close")

    def __repr__(self) -> str:
        to = "closed" if self._closed else f"to {', '.join(peer.address for peer in self._fleet.peers) or 'no worker'}"
        return f"<WeightSender {self.config.backend} {to}, version {self.version!r}>"

    def _cancel(self) -> None:
        role = self._role[1] if self._role is not None else None
        if isinstance(role, Follower):
            role.cancel()
        else:
            self._fleet.cancel("the task that sends was cancelled")

    @property
    def _may_send(self) -> bool:
        return self.parallel_config is None or self.parallel_config.rank == 0

    def _sends(self, source: WeightSource) -> bool:
        return (self.parallel_config or ranks_of(source)).rank == 0

    @property
    def _by_region(self) -> bool:
        return self._fleet.engines.by_region

    def _role_of(self, ranks: ParallelConfig) -> Leader | Follower:
        """Return what this process is among the trainer's ranks; the same object while there are as many."""
        if self._role is None or self._role[0] != ranks:
            if self._role is not None:
                self._role[1].close()
            if ranks.world_size > 1 and self._key is None:
                self._key = next_key()
            key = self._key or ""
            role: Leader | Follower
            if ranks.rank:
                role = Follower(self._backend, self.config, ranks, key)
            else:
                role = Leader(self._backend, self.config, self._fleet, Crew(self.config, key, ranks))
            self._role = ranks, role
        return self._role[1]

    def _next(self, version: Version | None, outgoing: Outgoing) -> Version:
        if version is not None:
            return as_version(version)
        if outgoing.version is not None:
            return following([outgoing.version])
        return following(self._fleet.versions(outgoing.target))

    @contextmanager
    def _operation(self, method: str) -> Iterator[None]:
        if self._closed:
            raise LifecycleError(f"{method}: this sender is closed; create a new one.", method=method, state="closed")
        if not self._exclusive.acquire(blocking=False):
            raise LifecycleError(
                f"{method}: another thread is sending; one update at a time.", method=method, state="sending"
            )
        self._fleet.go_on()
        try:
            with reading():
                yield
        finally:
            self._exclusive.release()
