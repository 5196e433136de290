"""The worker's session: takes updates, and never lets a torn one be served.


    created ──init──▶ ready ──start──▶ updating ──update, finish──▶ ready (new version)
                        ▲                 │
                        │                 ├─ failed or aborted before the first byte ─▶ ready (old version)
                        └───────init──────┴─ failed or aborted after it ─▶ failed (no version)

A failed receiver has shut its engine down; ``init_weight_transfer_engine`` and a full update lead out of it. A
`WeightSender` does that by itself at its next ``send``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.autograd_modes import Writing, reading
from weight_transfer.config import ParallelConfig, WeightTransferConfig
from weight_transfer.deadline import Deadline
from weight_transfer.errors import LifecycleError, TransferError, TransferTimeoutError, WeightTransferError
from weight_transfer.events import TransferFinished, TransferStarted
from weight_transfer.info import WireDecoder
from weight_transfer.loading import Weights, loader_for
from weight_transfer.manager import add_observers, load_backend
from weight_transfer.read_config import load_config
from weight_transfer.report import WorkerReport
from weight_transfer.update import Update

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.engine import WeightTransferEngine
    from weight_transfer.events import Version


class ReceiverState(StrEnum):
    """Where a receiver stands; see the drawing in this module."""

    CREATED = "created"
    READY = "ready"
    UPDATING = "updating"
    FAILED = "failed"
    CLOSED = "closed"


class WeightReceiver:
    """Receives weight versions into a model of this process. Its methods may be called from any thread.

    Give it to `serve`, to a `WeightSender` of the same process, or call
    the methods that carry vLLM's names from your own RPC.

    Args:
        config: anything that `load_config` takes.
        model: the model that serves.
        parallel_config: this worker's place among the workers behind one control channel.
        load_weights: loads weights in checkpoint format; default is the model's own ``load_weights`` method, else a
            copy by name.
        process_weights_after_loading: called with each layer's module once its last parameter has arrived.
        observers: objects with hook implementations, beside the ones that the config names.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        *,
        parallel_config: ParallelConfig | None = None,
        load_weights: Callable[[Weights], object] | None = None,
        process_weights_after_loading: Callable[[nn.Module], object] | None = None,
        observers: tuple[object, ...] = (),
    ) -> None:
        self.config: WeightTransferConfig = load_config(config)
        parallel = parallel_config or ParallelConfig()
        self.parallel_config = attrs.evolve(parallel, device=parallel.device or _device_of(model))
        self._backend = load_backend(self.config.backend)
        add_observers(self._backend, self.config.observers, observers)
        self._loaders = loader_for(model, load_weights, process_weights_after_loading)
        self._writing = Writing(model)
        self._engine: WeightTransferEngine[Any, Any] | None = None
        self._decoder = WireDecoder()
        self._changed = threading.Condition()
        self._state = ReceiverState.CREATED
        self._version: Version | None = None
        self._readers = 0
        self._busy: str | None = None
        self._update: Update | None = None
        self._last_error: str | None = None

    @property
    def state(self) -> ReceiverState:
        """Where this receiver stands now."""
        with self._changed:
            self._give_up_if_abandoned()
            return self._state

    @property
    def version(self) -> Version | None:
        """The version that is served; None before the first, during an update and after a failure."""
        with self._changed:
            self._give_up_if_abandoned()
            return None if self._state is ReceiverState.UPDATING else self._version

    @contextmanager
    def serving(self, timeout: float | None = None) -> Iterator[Version]:
        """Hold one version still while sampling from it: ``with receiver.serving() as version: ...``.

        Waits until a version is served. An update that arrives meanwhile waits until the block is left.

        Args:
            timeout: seconds to wait for a version; default is ``config.timeout``.

        Raises:
            TransferTimeoutError: no version was served within that time.
        """
        deadline = Deadline(self.config.timeout if timeout is None else timeout)
        with self._changed:
            while (version := self.version) is None:
                self._require_open("serving")
                if deadline.expired:
                    raise deadline.timeout(
                        f"waiting for a version to serve (state {self._state})", backend=self.config.backend
                    )
                self._changed.wait(min(deadline.remaining(), 1.0))
            self._readers += 1
        try:
            yield version
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a trainer. In a later call the previous engine is shut down first; a served version stays served.

        Raises:
            ConfigError: ``init_info`` is wrong; the sentence names the key.
            BackendUnavailableError: this machine lacks what the backend needs.
            HandshakeError, PeerLostError, TransferTimeoutError: joining failed.
        """
        with self._operation("init_weight_transfer_engine"):
            self._drop_engine()
            if self._state is ReceiverState.UPDATING:
                self._end_update("a trainer initialised this worker anew")
            self._set_state(ReceiverState.CREATED)
            engine = self._backend.create_worker_engine(self.config, self.parallel_config)
            try:
                with reading():
                    engine.init_transfer_engine(engine.parse_init_info(init_info))
            except BaseException as error:
                engine.shutdown()
                named = self._mapped(error, "init")
                self._last_error = str(named)
                if named is error:
                    raise
                raise named from error
            self._engine = engine
            self._decoder = WireDecoder()
            self._set_state(ReceiverState.READY)

    def start_weight_update(self) -> None:
        """Begin an update: wait until nobody samples any more, and serve no version until it is over.

        Raises:
            LifecycleError: there is no engine, or an update is under way.
            TransferTimeoutError: somebody went on sampling for ``config.timeout`` seconds; the version stays served.
        """
        with self._operation("start_weight_update", ReceiverState.READY), self._changed:
            self._set_state(ReceiverState.UPDATING)
            self._update = update = Update(self.config.timeout)
            try:
                while self._readers:
                    update.check("waiting for the sampling of the old version to end")
                    self._changed.wait(min(update.deadline.remaining(), 0.1))
            except TransferError as error:
                self._end_update(str(error))
                raise

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """Receive and load every weight; returns when all of them are in place and verified.

        Returns:
            A `WorkerReport` as a dict: how the bytes travelled, and warnings.

        Raises:
            LifecycleError: no update was started, or this one has its weights already.
            ConfigError: ``update_info`` is wrong; the sentence names the key.
            ManifestMismatchError: the weights do not fit the model; nothing was changed.
            TransferError: anything else; unless the model is untouched, no version is served.
        """
        with self._operation("update_weights", ReceiverState.UPDATING):
            assert self._engine is not None and self._update is not None
            if self._update.complete:
                raise self._lifecycle("update_weights", "this update has its weights already; finish it")
            try:
                self._receive(self._engine, self._update, update_info)
            except BaseException as error:
                named = self._mapped(error, "update", self._update)
                self._end_update(str(named))
                if named is error:
                    raise
                raise named from error
            return WorkerReport(self._engine.transport, self._engine.warnings).to_dict()

    def finish_weight_update(self, weight_version: Version | None = None) -> None:
        """Publish the version.

        Args:
            weight_version: its name; default is the one that came with the update.

        Raises:
            LifecycleError: the update has not received its weights.
        """
        with self._operation("finish_weight_update", ReceiverState.UPDATING):
            update = self._update
            if update is None or not update.complete:
                raise self._lifecycle("finish_weight_update", "its weights have not arrived; call update_weights first")
            version = update.version if weight_version is None else weight_version
            if version is None:
                raise self._lifecycle("finish_weight_update", "the update has no version; name one")
            self._finished(update, version, None)
            with self._changed:
                self._version, self._update, self._last_error = version, None, None
                self._set_state(ReceiverState.READY)

    def abort_weight_update(self, reason: str = "the trainer aborted the update") -> None:
        """Give up a running update, also from another thread. Without one, does nothing.

        Returns once nothing writes into the model any more.

        Raises:
            TransferTimeoutError: the engine went on for ``config.timeout`` seconds.
        """
        update, engine = self._update, self._engine
        if update is None:
            return
        update.abort(reason)
        if engine is not None:
            engine.abort_update()
        with self._operation("abort_weight_update"):
            if self._update is update:
                self._end_update(reason)

    def status(self) -> dict[str, Any]:
        """Return ``state``, ``version``, ``backend``, ``workers`` (1) and ``error`` (since the last good update)."""
        return {
            "state": str(self.state),
            "version": self.version,
            "backend": self.config.backend,
            "workers": 1,
            "error": self._last_error,
        }

    def close(self) -> None:
        """Abort a running update and shut the engine down. The model keeps its weights."""
        self.abort_weight_update("the worker is closing")
        with self._operation("close"):
            self._drop_engine()
            self._set_state(ReceiverState.CLOSED)

    def __enter__(self) -> WeightReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, engine: WeightTransferEngine[Any, Any], update: Update, update_info: dict[str, Any]) -> None:
        info = engine.parse_update_info(self._decoder.decode(update_info, engine.update_info_cls))
        loader = self._loaders[info.is_checkpoint_format]
        loader.begin(info.manifest)
        update.begin(
            info, loader, lambda event: self._backend.notify("weight_transfer_progress", event), self.config.backend
        )
        self._backend.notify("weight_transfer_started", self._started(update))
        with self._writing(loader):
            engine.receive_weights(info, update)
            update.finish()
        _synchronize(self.parallel_config.device)
        self._decoder.remember(update_info, info)

    def _end_update(self, reason: str) -> None:
        """Leave the updating state after a failure: served as before if untouched, else no version."""
        update = self._update
        self._last_error = reason
        if update is None:
            return
        if update.begun:
            self._finished(update, update.version, reason)
            self._drop_engine()
        with self._changed:  # an abort that still sees the update waits for this
            self._update = None
            if update.touched:
                self._version = None
                self._set_state(ReceiverState.FAILED)
            else:
                self._set_state(ReceiverState.CREATED if self._engine is None else ReceiverState.READY)

    def _give_up_if_abandoned(self) -> None:
        """A trainer that died between two calls leaves an update open; its deadline ends that too."""
        if self._state is ReceiverState.UPDATING and not self._busy and self._update and self._update.deadline.expired:
            self._end_update("the trainer did not go on with the update within its deadline")

    @contextmanager
    def _operation(self, method: str, *states: ReceiverState) -> Iterator[None]:
        """Let one operation at a time run, and only in one of ``states`` (none: in any but closed)."""
        with self._changed:
            self._give_up_if_abandoned()
            self._require_open(method)
            if method in ("abort_weight_update", "close"):
                self._wait_until_idle(method)
            if self._busy:
                raise self._lifecycle(method, f"{self._busy} is under way")
            if states and self._state not in states:
                raise self._lifecycle(method, f"allowed in state {' or '.join(states)} only; {_ADVICE[self._state]}")
            self._busy = method
        try:
            yield
        finally:
            with self._changed:
                self._busy = None
                self._changed.notify_all()

    def _wait_until_idle(self, method: str) -> None:
        deadline = Deadline(self.config.timeout)
        while self._busy:
            if deadline.expired:
                raise deadline.timeout(f"{method} waited for {self._busy} to end", backend=self.config.backend)
            self._changed.wait(deadline.remaining())

    def _require_open(self, method: str) -> None:
        if self._state is ReceiverState.CLOSED and method != "close":
            raise self._lifecycle(method, "this receiver is closed; create a new one")

    def _lifecycle(self, method: str, why: str) -> LifecycleError:
        message = f"{method} cannot be called in state {self._state}: {why}."
        return LifecycleError(message, method=method, state=str(self._state))

    def _set_state(self, state: ReceiverState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _mapped(self, error: BaseException, phase: str, update: Update | None = None) -> BaseException:
        """Turn a foreign exception into a TransferError; this is the one boundary where that happens on a worker."""
        if not isinstance(error, Exception):
            return error
        fields: dict[str, Any] = {"backend": self.config.backend, "phase": phase}
        fields["version"] = update.version if update else None
        if update is not None and update.aborted:
            return TransferError(f"The update was aborted: {update.abort_reason}.", **fields)
        if isinstance(error, WeightTransferError):
            return error
        kind = TransferTimeoutError if isinstance(error, TimeoutError) else TransferError
        return kind(f"The worker failed in phase {phase}.", cause=f"{type(error).__name__}: {error}", **fields)

    def _started(self, update: Update) -> TransferStarted:
        return TransferStarted(
            role="worker",
            backend=self.config.backend,
            version=update.version,
            nbytes=update.nbytes,
            params=update.params,
            workers=1,
        )

    def _finished(self, update: Update, version: Version | None, error: str | None) -> None:
        seconds = time.monotonic() - update.since
        event = TransferFinished(
            role="worker",
            backend=self.config.backend,
            version=version,
            nbytes=update.nbytes,
            seconds=seconds,
            error=error,
        )
        self._backend.notify("weight_transfer_finished", event)


_ADVICE = {
    ReceiverState.CREATED: "call init_weight_transfer_engine first",
    ReceiverState.READY: "call start_weight_update first",
    ReceiverState.UPDATING: "finish or abort the running update first",
    ReceiverState.FAILED: "the last update failed; call init_weight_transfer_engine and send a full update",
    ReceiverState.CLOSED: "create a new receiver",
}


def _device_of(model: nn.Module) -> str:
    first = next(chain(model.parameters(), model.buffers()), None)
    return str(first.device) if first is not None else "cpu"


def _synchronize(device: str | None) -> None:
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.current_stream(torch.device(device)).synchronize()
