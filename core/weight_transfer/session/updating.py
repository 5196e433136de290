"""The worker's side of one update: drives the engine, names what fails, and tells the listeners."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import (
    ConfigError,
    ManifestMismatchError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
)
from weight_transfer.model.autograd_modes import Writing, reading
from weight_transfer.model.info import MODEL, WeightTransferInitInfo, WireDecoder
from weight_transfer.model.loading import loader_for
from weight_transfer.values.events import TransferFinished, TransferStarted
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.engine import WeightTransferEngine
    from weight_transfer.model.loading import Weights
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.serving import Served
    from weight_transfer.session.update import Update
    from weight_transfer.values.events import Version


class Target:
    """A model that weights are for.

    Args:
        model: the module.
        load_weights: see `WeightReceiver`, as for the others.
        process_weights_after_loading: see there.
        ignore: see there.

    Attributes:
        loaders: by whether they take checkpoint format.
        writing: the mode in which its weights are written.
    """

    def __init__(
        self,
        model: nn.Module,
        load_weights: Callable[[Weights], object] | None,
        process_weights_after_loading: Callable[[nn.Module], object] | None,
        ignore: Sequence[str],
    ) -> None:
        self.loaders = loader_for(model, load_weights, process_weights_after_loading, ignore)
        self.writing = Writing(model)


def targets_of(
    model: nn.Module,
    load_weights: Callable[[Weights], object] | None,
    process_weights_after_loading: Callable[[nn.Module], object] | None,
    others: Mapping[str, nn.Module],
    ignore: Sequence[str],
) -> dict[str, Target]:
    """Return a receiver's targets by name; the arguments are those of `WeightReceiver`.

    Raises:
        ConfigError: one is no module, or has no name of its own.
    """
    if not isinstance(others, Mapping):
        raise ConfigError(f'targets: expected models by name, such as {{"draft": draft_model}}, got {others!r}.')
    targets = {MODEL: Target(_module("model", model), load_weights, process_weights_after_loading, ignore)}
    for name, other in others.items():
        if not isinstance(name, str) or not name or name == MODEL:
            raise ConfigError(f"targets: {name!r} is no name for a further model; {MODEL!r} is the first one's.")
        targets[name] = Target(_module(f"targets: {name}", other), None, None, ignore)
    return targets


def device_of(model: nn.Module) -> str:
    """Return the device on which a model lies: that of its first weight."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return str(first.device) if first is not None else "cpu"


class Joined:
    """A worker's place with one trainer: the engine that joins it, and what it was sent once.

    Attributes:
        engine: the worker's engine.
    """

    def __init__(self, engine: WeightTransferEngine[Any, Any], backend: LoadedBackend) -> None:
        self.engine = engine
        self._backend = backend
        self._name = backend.backend.name
        self._decoders: dict[str, WireDecoder] = {}

    def join(self, init_info: dict[str, Any]) -> WeightTransferInitInfo:
        """Let the engine join the trainer; return what that has said."""
        with _naming(self._name, "init", None):
            info: WeightTransferInitInfo = self.engine.parse_init_info(init_info)
            with reading():
                self.engine.init_transfer_engine(info)
        return info

    def receive(
        self,
        update: Update,
        update_info: dict[str, Any],
        targets: Mapping[str, Target],
        served: Served,
    ) -> dict[str, Any]:
        """Receive all weights and return the report.

        Args:
            update: the guard in front of the loader.
            update_info: what the trainer says.
            targets: by name.
            served: what the targets have.
        """
        with _naming(self._name, "update", update):
            self._receive(update, update_info, targets, served)
        return WorkerReport(self.engine.transport, self.engine.warnings).to_dict()

    def _receive(
        self,
        update: Update,
        update_info: dict[str, Any],
        targets: Mapping[str, Target],
        served: Served,
    ) -> None:
        engine = self.engine
        name = update_info.get("target", MODEL)
        if not isinstance(name, str) or name not in targets:
            raise ManifestMismatchError(
                f"These weights are for target {name!r}, but this worker has {', '.join(map(repr, targets))}; give "
                "the receiver that model, too: WeightReceiver(..., targets={...}).",
                phase="update",
            )
        update.target, target = name, targets[name]
        decoder = self._decoders.setdefault(name, WireDecoder())
        info = engine.parse_update_info(decoder.decode(update_info, engine.update_info_cls))
        if info.manifest.partial and (info.base is None or served.updates.get(name) != info.base):
            raise ManifestMismatchError(
                "Some weights came, to be put to others that this trainer has sent before, but this worker has "
                f"{_has(served.versions.get(name))}; send all of them first.",
                phase="update",
            )
        loader = target.loaders[info.is_checkpoint_format]
        loader.begin(info.manifest)
        update.begin(info, loader, lambda event: self._backend.notify("weight_transfer_progress", event), self._name)
        self._backend.notify("weight_transfer_started", self._started(update))
        with target.writing(loader):
            engine.receive_weights(info, update)
            update.finish()
        _synchronize(engine.parallel_config.device)
        decoder.remember(update_info, info)

    def _started(self, update: Update) -> TransferStarted:
        return TransferStarted(
            role="worker",
            backend=self._name,
            version=update.version,
            nbytes=update.nbytes,
            params=update.params,
            workers=1,
            target=update.target,
        )

    def tell_end(self, update: Update, version: Version | None, error: str | None) -> None:
        """Tell the listeners that an update is over; ``error`` is the sentence of its failure."""
        event = TransferFinished(
            role="worker",
            backend=self._name,
            version=version,
            nbytes=update.nbytes,
            seconds=time.monotonic() - update.since,
            error=error,
            target=update.target,
        )
        self._backend.notify("weight_transfer_finished", event)


def _has(version: Version | None) -> str:
    return "none that are whole" if version is None else f"a version {version!r} that is not made of those"


@contextmanager
def _naming(backend: str, phase: str, update: Update | None) -> Iterator[None]:
    """Turn a foreign exception into a TransferError; this is the one boundary where that happens on a worker."""
    try:
        yield
    except BaseException as error:
        named = _named(error, backend, phase, update)
        if named is error:
            raise
        raise named from error


def _named(error: BaseException, backend: str, phase: str, update: Update | None) -> BaseException:
    # a loader that exits or cancels has failed; only Ctrl-C is meant for the process
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        return error
    fields: dict[str, Any] = {"backend": backend, "phase": phase, "version": update.version if update else None}
    if update is not None and update.aborted:
        return update.abort_error(**fields)
    if isinstance(error, WeightTransferError):
        return error
    kind = TransferTimeoutError if isinstance(error, TimeoutError) else TransferError
    return kind(f"The worker failed in phase {phase}.", cause=f"{type(error).__name__}: {error}", **fields)


def _module(what: str, value: object) -> nn.Module:
    from torch import nn

    if not isinstance(value, nn.Module):
        raise ConfigError(f"{what}: expected the nn.Module that serves, got {type(value).__name__}.")
    return value


def _synchronize(device: str | None) -> None:
    import torch

    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.current_stream(torch.device(device)).synchronize()
