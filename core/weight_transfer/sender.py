"""The trainer's session: brings every worker to a new version, or says which one failed and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.backend import Capability
from weight_transfer.config import ParallelConfig, WeightTransferConfig, load_config
from weight_transfer.deadline import Deadline
from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
)
from weight_transfer.events import TransferFinished, TransferProgress, TransferStarted
from weight_transfer.info import WeightTransferUpdateInfo, WireEncoder
from weight_transfer.integrity import tensor_digest
from weight_transfer.lockstep import LockstepSource
from weight_transfer.manager import add_observers, load_backend
from weight_transfer.peers import Calls, Peer, make_peers, make_slots
from weight_transfer.report import TransferReport
from weight_transfer.source import ModuleSource, WeightSource, as_source
from weight_transfer.structuring import structure, unstructure

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.control import ControlChannel
    from weight_transfer.engine import TrainerWeightTransferEngine
    from weight_transfer.events import Version
    from weight_transfer.manifest import Manifest

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT = 10.0  # seconds that workers get to abort a failed update
_RETRY_INTERVAL = 0.1  # seconds between two looks at a worker that does not answer yet
_PROGRESS_INTERVAL = 0.1  # seconds

Lost = dict[Peer, WeightTransferError]


class WeightSender:
    """Sends weight versions to all workers. Use it as a context manager, or call `close`.

    Args:
        config: anything that `load_config` takes.
        workers: a control channel per worker or replica: a URL, a `WeightReceiver` of this
            process, or any object with the methods of `ControlChannel`.
        parallel_config: this process's rank among the trainer's ranks. All ranks construct a sender and call
            `send`; rank 0 talks to the workers, the others run the collectives of the source.
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
        self.parallel_config = parallel_config or ParallelConfig()
        self._backend = load_backend(self.config.backend)
        add_observers(self._backend, self.config.observers, observers)
        if isinstance(workers, str) or not workers:
            raise ConfigError('WeightSender needs a list of workers, as in workers=["http://127.0.0.1:8001"].')
        self._sends = self.parallel_config.rank == 0
        self._peers = make_peers(workers, workers_per_channel, self.config) if self._sends else []
        self._rejoins = Capability.REJOIN in self._backend.backend.capabilities
        self._goes_on = self._rejoins and self.config.on_worker_failure == "continue"
        self._engine: TrainerWeightTransferEngine[Any, Any] | None = None
        self._encoder = WireEncoder()
        self._source: ModuleSource | None = None
        self._device: str | None = None
        self._version: Version | None = None
        self._exclusive = threading.Lock()
        self._closed = False

    @property
    def version(self) -> Version | None:
        """The last version that `send` brought to the workers."""
        return self._version

    def connect(self) -> None:
        """Join all workers now; `send` does it by itself. Waits for workers that are not up yet.

        Raises:
            PeerLostError: a worker did not answer within ``config.init_timeout`` seconds.
            HandshakeError: a worker has another backend, or refuses the token.
        """
        with self._operation("connect"):
            if self._sends:
                try:
                    self._join()
                except BaseException as error:
                    self._abort(str(error))
                    raise

    def send(self, weights: nn.Module | WeightSource, version: Version | None = None) -> TransferReport:
        """Bring all workers to these weights. The weights may change as soon as this returns.

        Args:
            weights: the model, or a source. Every trainer rank passes its own shards of the same model.
            version: the new version's name; default is the last one plus 1.

        Returns:
            What was sent, to whom and how fast.

        Raises:
            TransferError: the update failed; ``peer`` names the worker. No worker publishes the version, and the next
                ``send`` joins all of them again. With ``on_worker_failure = "continue"`` only if it failed on all.
        """
        with self._operation("send"):
            version = self._next(version)
            source = self._as_source(weights)
            manifest = source.manifest()
            if not manifest.params:
                raise ConfigError("The weights to send have no parameters.")
            lockstep = LockstepSource(source, passes=2 if self.config.verify else 1)
            try:
                report = self._observed_send(lockstep, manifest, version)
            finally:
                lockstep.drain()
            self._version = version
            return report

    def close(self) -> None:
        """Shut the engine and the channels down. The workers keep serving their version."""
        self._closed = True
        self._drop_engine()
        for peer in self._peers:
            close = getattr(peer.channel, "close", None)
            if peer.owned and close is not None:
                close()

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One update, in the order in which it happens.

    def _observed_send(self, source: LockstepSource, manifest: Manifest, version: Version) -> TransferReport:
        common: dict[str, Any] = {"role": "trainer", "backend": self.config.backend, "version": version}
        common["nbytes"] = manifest.nbytes
        started = TransferStarted(**common, params=len(manifest.params), workers=len(self._peers))
        self._backend.notify("weight_transfer_started", started)
        since = time.monotonic()
        message = None
        try:
            return self._send(source, manifest, version)
        except BaseException as error:
            message = str(error)
            self._abort(message)
            named = self._named(error, version)
            if named is error:
                raise
            raise named from error
        finally:
            event = TransferFinished(**common, seconds=time.monotonic() - since, error=message)
            self._backend.notify("weight_transfer_finished", event)

    def _send(self, source: LockstepSource, manifest: Manifest, version: Version) -> TransferReport:
        seconds: dict[str, float] = {}
        lost: Lost = {}
        if self._sends:
            self._settle_on(source.device)
            with _timed(seconds, "init"):
                lost |= self._join()
                self._require_one(lost)
            deadline = Deadline(self.config.timeout)
            with _timed(seconds, "start"):
                lost |= self._start(deadline)
                self._require_one(lost)
            with _timed(seconds, "update"):
                lost |= self._update(source, manifest, version, deadline)
                self._require_one(lost)
            with _timed(seconds, "finish"):
                lost |= self._finish(version, deadline)
                self._require_one(lost)
        return TransferReport(
            backend=self.config.backend,
            version=version,
            nbytes=manifest.nbytes,
            params=len(manifest.params),
            workers=tuple(peer.address for peer in self._peers if peer not in lost),
            lost=tuple((peer.address, str(error)) for peer, error in lost.items()),
            seconds=seconds,
            extra_memory=self._engine.extra_memory if self._engine else 0,
        )

    def _settle_on(self, device: str) -> None:
        """Tell the engine where the weights lie; it is made anew if they have moved."""
        if self.parallel_config.device is None:
            if self._device not in (None, device):
                self._drop_engine()
            self._device = device

    def _join(self) -> Lost:
        """Join the workers that are not joined; all of them, if the backend cannot take in a single one."""
        if all(peer.joined for peer in self._peers):
            return {}
        deadline = Deadline(self.config.init_timeout)
        absent = [peer for peer in self._peers if not peer.joined]
        lost = self._settle(Calls(absent, lambda peer: self._greet(peer, deadline), "init").wait(deadline))
        present = [peer for peer in self._peers if peer not in lost]
        if not self._rejoins:
            self._drop_engine()
        joining = [peer for peer in present if not peer.joined]
        if not joining:
            return lost
        engine = self._engine = self._engine or self._create_engine()
        slots = make_slots(self._peers if self._rejoins else present)
        fields = engine.open_endpoint([slots[peer] for peer in joining], deadline)
        for peer, own in zip(joining, fields, strict=True):
            slot = slots[peer]
            common = {"rank_offset": slot.rank_offset, "world_size": slot.world_size, "timeout": deadline.remaining()}
            peer.init_info = unstructure(structure({**own, **common}, engine.init_info_cls, "init_info"))
        calls = Calls(
            joining,
            lambda peer: peer.channel.init_weight_transfer_engine(peer.init_info),
            "init",
            on_failure=engine.abort_update,
        )
        try:
            engine.join_workers(deadline)
        except WeightTransferError as error:
            cause = calls.explain(error)
            if not (calls.failures and self._goes_on):
                if cause is error:
                    raise
                raise cause from error
        lost |= self._settle(calls.wait(deadline))
        for peer in joining:
            peer.joined = peer not in lost
        return lost

    def _greet(self, peer: Peer, deadline: Deadline) -> None:
        """Wait until a worker answers, and learn from its status what it is."""
        status_of = getattr(peer.channel, "status", None)
        if status_of is None:
            return
        while True:
            try:
                status = status_of()
                break
            except PeerLostError:
                if self.config.on_worker_failure == "continue" or deadline.remaining() < _RETRY_INTERVAL:
                    raise
                time.sleep(_RETRY_INTERVAL)
        if status.get("backend", self.config.backend) != self.config.backend:
            raise HandshakeError(
                f"The worker uses backend {status['backend']!r}, the trainer {self.config.backend!r}; use one.",
                peer=peer.address,
                phase="init",
            )
        peer.count = int(status.get("workers", peer.count))

    def _start(self, deadline: Deadline) -> Lost:
        """Open the update; a worker that was restarted since the last one joins again first."""
        lost: Lost = {}
        failures = self._start_joined(deadline)
        gone = {peer: error for peer, error in failures.items() if isinstance(error, (LifecycleError, PeerLostError))}
        lost |= self._settle({peer: error for peer, error in failures.items() if peer not in gone})
        if gone:
            for peer in gone:
                peer.forget()
            lost |= self._join()
            lost |= self._settle(self._start_joined(deadline))
        return lost

    def _start_joined(self, deadline: Deadline) -> Lost:
        peers = [peer for peer in self._peers if peer.joined and not peer.started]
        failures = Calls(peers, lambda peer: peer.channel.start_weight_update(), "start").wait(deadline)
        for peer in peers:
            peer.started = peer not in failures
        return failures

    def _update(self, source: LockstepSource, manifest: Manifest, version: Version, deadline: Deadline) -> Lost:
        assert self._engine is not None
        engine = self._engine
        info: WeightTransferUpdateInfo = engine.update_info_cls(
            manifest=manifest,
            timeout=max(deadline.remaining(), 1e-3),
            version=version,
            is_checkpoint_format=self.config.is_checkpoint_format,
            digests=tuple(tensor_digest(tensor) for _, tensor in source) if self.config.verify else None,
            **engine.describe_update(source, manifest, deadline),
        )
        wires = {peer: self._encoder.encode(info, peer.known) for peer in self._started()}
        calls = Calls(
            list(wires),
            lambda peer: peer.channel.update_weights(wires[peer]),
            "update",
            on_failure=None if self._goes_on else engine.abort_update,
        )
        progress = _Progress(self._backend.notify, info, self.config.backend)
        try:
            engine.send_weights(source, manifest, deadline, progress)
        except WeightTransferError as error:
            cause = calls.explain(error)
            if cause is error:
                raise
            raise cause from error
        failures = calls.wait(deadline)
        for peer in wires:
            peer.known = self._encoder.digests(info) if peer not in failures else {}
        lost = self._settle(failures)
        progress(progress.left)
        engine.release_source()
        return lost

    def _finish(self, version: Version, deadline: Deadline) -> Lost:
        peers = self._started()
        failures = Calls(peers, lambda peer: peer.channel.finish_weight_update(version), "finish").wait(deadline)
        for peer in peers:
            peer.started = False
        return self._settle(failures)

    def _started(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.started]

    def _settle(self, failures: Lost) -> Lost:
        """Decide about workers that failed: raise the first error, or go on without them, as the config says."""
        for peer in failures:
            peer.forget()
        others = any(peer.joined for peer in self._peers) or len(failures) < len(self._peers)
        if failures and (self.config.on_worker_failure == "abort" or not others):
            raise next(iter(failures.values()))
        for peer, error in failures.items():
            logger.warning("going on without worker %s: %s", peer.address, error)
        return failures

    def _require_one(self, lost: Lost) -> None:
        """Raise the last failure if no worker is left: they may have failed one after another, in different phases."""
        if lost and not any(peer.joined for peer in self._peers):
            raise next(reversed(lost.values()))

    def _abort(self, reason: str) -> None:
        """After a failure: no worker keeps the update open, and all of them join again next time."""
        if self._engine is not None:
            self._engine.abort_update()
        open_ = [peer for peer in self._started() if hasattr(peer.channel, "abort_weight_update")]
        calls = Calls(open_, lambda peer: peer.channel.abort_weight_update(reason), "abort")
        for peer, error in calls.wait(Deadline(min(_ABORT_TIMEOUT, self.config.timeout))).items():
            logger.warning("worker %s did not confirm the abort: %s", peer.address, error)
        if self._engine is not None:
            self._engine.release_source()
        if not self._rejoins:
            self._drop_engine()
        for peer in self._peers:
            peer.forget()

    def _create_engine(self) -> TrainerWeightTransferEngine[Any, Any]:
        parallel = self.parallel_config
        if parallel.device is None:
            parallel = attrs.evolve(parallel, device=self._device or "cpu")
        return self._backend.create_trainer_engine(self.config, parallel)

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        for peer in self._peers:
            peer.forget()

    def _named(self, error: BaseException, version: Version) -> BaseException:
        """Give an error its context, and a foreign exception its place in the tree; the trainer's one such boundary."""
        if isinstance(error, TransferError):
            error.backend = error.backend or self.config.backend
            error.version = version if error.version is None else error.version
        if isinstance(error, WeightTransferError) or not isinstance(error, Exception):
            return error
        kind = TransferTimeoutError if isinstance(error, TimeoutError) else TransferError
        cause = f"{type(error).__name__}: {error}"
        named = kind(
            "The trainer failed to send its weights.", backend=self.config.backend, version=version, cause=cause
        )
        named.__cause__ = error
        return named

    def _next(self, version: Version | None) -> Version:
        if version is not None:
            return version
        if isinstance(self._version, str):
            raise ConfigError(
                f"The last version is called {self._version!r}; name the new one: send(model, version=...)."
            )
        return 0 if self._version is None else self._version + 1

    def _as_source(self, weights: nn.Module | WeightSource) -> WeightSource:
        """Keep the source of a module from update to update: it remembers its manifest."""
        if self._source is not None and self._source.module is weights:
            return self._source
        source = as_source(weights)
        if isinstance(source, ModuleSource):
            self._source = source
        return source

    @contextmanager
    def _operation(self, method: str) -> Iterator[None]:
        if self._closed:
            raise LifecycleError(f"{method}: this sender is closed; create a new one.", method=method, state="closed")
        if not self._exclusive.acquire(blocking=False):
            raise LifecycleError(
                f"{method}: another thread is sending; one update at a time.", method=method, state="sending"
            )
        try:
            yield
        finally:
            self._exclusive.release()


class _Progress:
    """Turns an engine's byte counts into events, a few a second."""

    def __init__(self, notify: Any, info: WeightTransferUpdateInfo, backend: str) -> None:
        self._notify = notify
        self._info = info
        self._backend = backend
        self._done = 0
        self._told = 0.0

    @property
    def left(self) -> int:
        """Bytes that nobody has reported: those that the workers pulled."""
        return self._info.manifest.nbytes - self._done

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        total, now = self._info.manifest.nbytes, time.monotonic()
        if now - self._told >= _PROGRESS_INTERVAL or self._done == total:
            self._told = now
            event = TransferProgress(
                role="trainer", backend=self._backend, version=self._info.version, done=self._done, total=total
            )
            self._notify("weight_transfer_progress", event)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    since = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = time.perf_counter() - since
