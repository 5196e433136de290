"""The trainer's session: brings every worker to a new version, or says which one failed and why."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError, LifecycleError, WeightTransferError
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.model.autograd_modes import reading
from weight_transfer.model.info import MODEL, WeightTransferUpdateInfo
from weight_transfer.plugins.manager import add_observers, load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.session import background
from weight_transfer.session.configured_cast import ConfiguredCast
from weight_transfer.session.fleet import Fleet, Lost
from weight_transfer.session.guarded import GuardedSource
from weight_transfer.session.outgoing import Outgoing
from weight_transfer.session.progress import Progress, timed
from weight_transfer.session.ranks import ALONE, detected_ranks, ranks_of
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import TransferFinished, TransferStarted
from weight_transfer.values.report import TransferReport, WorkerReport
from weight_transfer.values.versions import as_version, following

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.control import ControlChannel
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.source import WeightSource
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.events import Version


class WeightSender:
    """Sends weight versions to all workers. Use it as a context manager, or call `close`.

    Args:
        config: anything that `load_config` takes.
        workers: a control channel per worker or replica: a URL, a `WeightReceiver` of this
            process, or any object with the methods of `ControlChannel`.
        parallel_config: this process's rank among the trainer's ranks. All ranks construct a sender and call
            `send`; rank 0 talks to the workers, the others run the collectives of the source. By default each process
            sends by itself, except that of weights which are sharded over ranks only rank 0 of torch.distributed's
            default group does.
        workers_per_channel: workers behind each channel, for channels whose ``status`` does not tell.
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
        self._exclusive = threading.Lock()
        self._closed = False

    @property
    def version(self) -> Version | None:
        """The last version of the model that `send` brought to the workers."""
        return self._targets[MODEL].version if MODEL in self._targets else None

    def connect(self) -> None:
        """Join all workers now; `send` does it by itself. Waits for workers that are not up yet.

        A rank other than the first leaves it to `send`: it depends on the weights whether it sends at all.

        Raises:
            PeerLostError: a worker did not answer within ``config.init_timeout`` seconds.
            HandshakeError: a worker has another backend, or refuses the token.
        """
        with self._operation("connect"):
            if (self.parallel_config or detected_ranks()).rank == 0:
                self._fleet.connect()

    def send(
        self,
        weights: nn.Module | WeightSource,
        version: Version | None = None,
        *,
        target: str = MODEL,
        only: Sequence[str] | None = None,
    ) -> TransferReport:
        """Bring all workers to these weights. The weights may change as soon as this returns.

        Args:
            weights: the model, or a source. Every trainer rank passes its own shards of the same model.
            version: the new version: a whole number or a name; default is the last one plus 1, at first the highest
                that the workers serve plus 1. With several trainer ranks the first one must be given.
            target: which of the receivers' models these weights are for; see ``targets`` of `WeightReceiver`.
            only: names or glob patterns of the weights to send; the workers keep the others, of the version that this
                sender has sent before, and the new version covers all of them.

        Returns:
            What was sent, to whom and how fast.

        Raises:
            TransferError: the update failed; ``peer`` names the worker. No worker publishes the version, and the next
                ``send`` joins all of them again. With ``on_worker_failure = "continue"`` only if it failed on all.
        """
        with self._operation("send"):
            outgoing = self._targets.get(target) or Outgoing(target)
            source = outgoing.part(self._cast.around(outgoing.whole(weights), outgoing), only)
            manifest = source.manifest()  # from here on the source knows whether it is sharded
            outgoing.require_base(manifest)
            version = self._next(version, outgoing, self._ranks(source))
            if not manifest.params:
                raise ConfigError("The weights to send have no parameters.")
            guarded = GuardedSource(source, manifest, passes=2 if self.config.verify else 1)
            try:
                report = self._observed_send(guarded, manifest, version, outgoing)
            finally:
                guarded.drain()
            outgoing.version, outgoing.update = version, guarded.update
            self._targets[target] = outgoing
            return report

    async def asend(
        self,
        weights: nn.Module | WeightSource,
        version: Version | None = None,
        *,
        target: str = MODEL,
        only: Sequence[str] | None = None,
    ) -> TransferReport:
        """`send` for asyncio: the event loop goes on meanwhile.

        A task that is cancelled in it aborts the update on all workers, and ends once nothing reads the weights any
        more.
        """
        sending = background.start(
            lambda: self.send(weights, version, target=target, only=only), "weight-transfer send"
        )
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            background.start(lambda: self._fleet.cancel("the task that sends was cancelled"), "weight-transfer cancel")
            with suppress(Exception):  # the failure of an update that nobody wants any more
                await asyncio.shield(sending)
            raise

    def add_worker(self, worker: str | ControlChannel) -> None:
        """Send to one more worker or replica, from the next `send` on.

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

    @property
    def _may_send(self) -> bool:
        return self.parallel_config is None or self.parallel_config.rank == 0

    def _sends(self, source: WeightSource) -> bool:
        return self._ranks(source).rank == 0

    def _ranks(self, source: WeightSource) -> ParallelConfig:
        return self.parallel_config or ranks_of(source)

    # One update, in the order in which it happens.

    def _observed_send(
        self, source: GuardedSource, manifest: Manifest, version: Version, outgoing: Outgoing
    ) -> TransferReport:
        common: dict[str, Any] = {"role": "trainer", "backend": self.config.backend, "version": version}
        common |= {"nbytes": manifest.nbytes, "target": outgoing.target}
        workers = len(self._fleet.peers) if self._sends(source) else 0
        started = TransferStarted(**common, params=len(manifest.params), workers=workers)
        self._backend.notify("weight_transfer_started", started)
        since = time.monotonic()
        message = None
        try:
            return self._send(source, manifest, version, outgoing)
        except BaseException as error:
            named = source.named(error, self.config.backend, version)
            message = str(named)
            self._fleet.abort(message)
            if named is error:
                raise
            raise named from error
        finally:
            event = TransferFinished(**common, seconds=time.monotonic() - since, error=message)
            self._backend.notify("weight_transfer_finished", event)

    def _send(self, source: GuardedSource, manifest: Manifest, version: Version, outgoing: Outgoing) -> TransferReport:
        seconds: dict[str, float] = {}
        lost: Lost = {}
        noticed: dict[Peer, WorkerReport] = {}
        sends = self._sends(source)
        if sends:
            self._fleet.place(source.device)
            with timed(seconds, "init"):
                lost |= self._fleet.join()
                self._fleet.require_one(lost)
            deadline = Deadline(self.config.timeout)
            with timed(seconds, "start"):
                lost |= self._fleet.start(deadline)
                self._fleet.require_one(lost)
            with timed(seconds, "update"):
                failures, noticed = self._update(source, manifest, version, outgoing, deadline)
                lost |= failures
                self._fleet.require_one(lost)
            with timed(seconds, "finish"):
                lost |= self._fleet.finish(version, deadline)
                self._fleet.require_one(lost)
        noticed = {peer: report for peer, report in noticed.items() if peer not in lost}
        return TransferReport(
            backend=self.config.backend,
            version=version,
            target=outgoing.target,
            nbytes=manifest.nbytes,
            params=len(manifest.params),
            workers=tuple(peer.address for peer in self._fleet.peers if peer not in lost) if sends else (),
            lost=tuple((peer.address, str(error)) for peer, error in lost.items()),
            seconds=seconds,
            extra_memory=self._fleet.engine.extra_memory if self._fleet.engine else 0,
            transports={peer.address: report.transport for peer, report in noticed.items() if report.transport},
            warnings=tuple(f"{peer.address}: {text}" for peer, report in noticed.items() for text in report.warnings),
        )

    def _update(
        self, source: GuardedSource, manifest: Manifest, version: Version, outgoing: Outgoing, deadline: Deadline
    ) -> tuple[Lost, dict[Peer, WorkerReport]]:
        """Move the bytes; return the workers that were lost, and what each has noticed."""
        assert self._fleet.engine is not None
        engine = self._fleet.engine
        info: WeightTransferUpdateInfo = engine.update_info_cls(
            manifest=manifest,
            timeout=max(deadline.remaining(), 1e-3),
            version=version,
            is_checkpoint_format=self.config.is_checkpoint_format,
            target=outgoing.target,
            update=source.update,
            base=outgoing.update if manifest.partial else None,
            digests=tuple(tensor_digest(tensor) for _, tensor in source) if self.config.verify else None,
            **engine.describe_update(source, manifest, deadline),
        )
        encoder, target = outgoing.encoder, outgoing.target
        wires = {peer: encoder.encode(info, peer.known.get(target, {})) for peer in self._fleet.started}
        calls = self._fleet.call(list(wires), lambda peer: peer.update(wires[peer]), "update", self._fleet.react)
        self._fleet.require_going_on()
        progress = Progress(self._backend.notify, info, self.config.backend)
        try:
            with source.watched():
                engine.send_weights(source, manifest, deadline, progress)
            source.finish()
        except Exception as error:
            cause = source.error or (calls.explain(error) if isinstance(error, WeightTransferError) else error)
            if cause is error:
                raise
            raise cause from error
        failures = calls.wait(deadline)
        for peer in wires:
            peer.known[target] = encoder.digests(info) if peer not in failures else {}
        lost = self._fleet.settle(failures)
        progress(progress.left)
        engine.release_source()
        return lost, {peer: WorkerReport.of(calls.results.get(peer)) for peer in wires}

    def _next(self, version: Version | None, outgoing: Outgoing, ranks: ParallelConfig) -> Version:
        if version is not None:
            return as_version(version)
        if outgoing.version is not None:
            return following([outgoing.version])
        if ranks.world_size > 1:
            raise ConfigError(
                "The first version of a trainer of several ranks needs a name, the same on each: only rank 0 could ask "
                "the workers what they serve. Give it: send(model, version=...)."
            )
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
