"""The worker's side of one update: drives the engine, names what fails, and tells the listeners."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import structure
from weight_transfer.errors import (
    ManifestMismatchError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
)
from weight_transfer.memory.gpu_digests import Geometry
from weight_transfer.memory.place import place_of
from weight_transfer.model.abilities import offers
from weight_transfer.model.autograd_modes import reading
from weight_transfer.model.info import MODEL, WeightNeeds, WeightTransferInitInfo, WireDecoder
from weight_transfer.model.loading import ExpectantLoader, VouchingLoader
from weight_transfer.model.manifest import digest_json
from weight_transfer.session.arrived import Arrived
from weight_transfer.session.incoming import Incoming
from weight_transfer.session.keeping import Keeping
from weight_transfer.values.events import TransferFinished, TransferStarted
from weight_transfer.values.report import Receipt, WorkerReport
from weight_transfer.values.versions import require_forward

if TYPE_CHECKING:
    from weight_transfer.engine import WeightTransferEngine
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.model.loading import WeightLoader
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.keeping import Arrivals
    from weight_transfer.session.served_models import ServedModel
    from weight_transfer.session.serving import Served
    from weight_transfer.session.update import Update
    from weight_transfer.values.events import TransferProgress, Version


class Joined:
    """A worker's place with one trainer: the engine that joins it, and what it was sent once.

    Attributes:
        engine: the worker's engine.
        text_versions: whether the trainer's calls name versions as text.
    """

    def __init__(self, engine: WeightTransferEngine[Any, Any], backend: LoadedBackend) -> None:
        self.engine = engine
        self.text_versions = False
        self._backend = backend
        self._name = backend.backend.name
        self._link = engine.config.link
        self._decoders: dict[str, WireDecoder] = {}
        self._kept: dict[tuple[str, bool], Keeping] = {}
        self._worker = 0
        self._latest: WeightLoader | None = None
        self._looking = threading.Lock()
        self._geometry = Geometry()

    def join(self, init_info: dict[str, Any]) -> WeightTransferInitInfo:
        """Let the engine join the trainer; return what that has said."""
        with _naming(self._name, "init", None):
            info: WeightTransferInitInfo = self.engine.parse_init_info(init_info)
            self._worker = info.rank_offset + self.engine.parallel_config.rank - 1
            self.text_versions = info.text_versions
            with reading():
                self.engine.init_transfer_engine(info)
        return info

    def forget(self, target: str) -> None:
        """Another model has taken a target's place: of what was worked out for the old one nothing holds."""
        self._latest = None
        for key in [key for key in self._kept if key[0] == target]:
            del self._kept[key]

    def receive(
        self,
        update: Update,
        update_info: dict[str, Any],
        targets: Mapping[str, ServedModel],
        served: Served,
    ) -> dict[str, Any]:
        """Receive all weights and return the report.

        Args:
            update: the guard in front of the loader.
            update_info: what the trainer says.
            targets: by name.
            served: what the targets have.
        """
        with _naming(self._name, "update", update), self._looking:
            return self._receive(update, update_info, targets, served).to_dict()

    def expect(self) -> None:
        """Do what can be done before the next update, as far as that is like the last one."""
        if self._looking.acquire(blocking=False):
            try:
                if offers(self._latest, ExpectantLoader):
                    self._latest.expect()
            finally:
                self._looking.release()

    def needs(self, request: dict[str, Any], targets: Mapping[str, ServedModel]) -> dict[str, Any]:
        """Say which regions of some weights this worker keeps; see `WeightReceiver.weight_needs`."""
        with _naming(self._name, "weight_needs", None), self._looking:
            name, target = _chosen(request, targets)
            decoder = self._decoders.setdefault(name, WireDecoder())
            asked = structure(decoder.decode(request, WeightNeeds), WeightNeeds, "request of weight_needs")
            asked = decoder.restored(request, asked)
            loader = target.loaders[asked.is_checkpoint_format]
            kept = self._keeping(name, asked.is_checkpoint_format).say(asked.manifest, loader)
            decoder.remember(request, asked)
        return {"needs": [None if kept is None else kept.to_wire()]}

    def _receive(
        self,
        update: Update,
        update_info: dict[str, Any],
        targets: Mapping[str, ServedModel],
        served: Served,
    ) -> WorkerReport:
        engine, phases = self.engine, update.phases
        phases.enter("plan")
        name, target = _chosen(update_info, targets)
        update.target = name
        decoder = self._decoders.setdefault(name, WireDecoder())
        info = engine.parse_update_info(decoder.decode(update_info, engine.update_info_cls))
        info = decoder.restored(update_info, info)
        if not info.allow_rollback:
            require_forward(info.version, served.committed.get(name), phase="update")
        if info.manifest.partial and (info.base is None or served.updates.get(name) != info.base):
            raise ManifestMismatchError(
                "Some weights came, to be put to others that this trainer has sent before, but this worker has "
                f"{_has(served.versions.get(name))}; send all of them first.",
                phase="update",
            )
        loader = target.loaders[info.is_checkpoint_format]
        update.loader = loader
        if offers(loader, VouchingLoader) and not info.manifest.partial and info.layout is None:
            loader.begin_in_stages(info.manifest)
        else:  # a part may not be given up: nothing but all weights could follow; pieces come in another order
            loader.begin(info.manifest)
        keeping = self._keeping(name, info.is_checkpoint_format)
        arrivals = keeping.arrivals(info, loader)

        def progress(event: TransferProgress) -> None:
            self._backend.notify("weight_transfer_progress", event)

        arrived = Arrived(info, arrivals, loader, self._geometry) if info.verify is not None else None
        update.begin(info, progress, self._name, arrivals, target.in_place, arrived)
        self._backend.notify("weight_transfer_started", self._started(update))
        moved: list[int] = []
        phases.enter("wire")
        with target.writing(loader, info.manifest):
            if arrivals is None:
                engine.receive_weights(info, update)
            else:
                moved = self._receive_both(info, update, arrivals)
            update.finish()
        _synchronize(engine.parallel_config.device)
        seconds = phases.told()
        phases.enter("wait")
        decoder.remember(update_info, info)
        self._latest = loader
        kept = arrivals.nbytes if arrivals is not None else 0
        again = keeping.asks_again(info.manifest, loader)
        update.receipt = self._receipt(info, arrivals, arrived)
        warnings = (*engine.warnings, *loader.warnings)
        return WorkerReport(engine.transport, warnings, kept, tuple(moved), again, (update.receipt,), seconds)

    def _receipt(self, info: WeightTransferUpdateInfo, arrivals: Arrivals | None, arrived: Arrived | None) -> Receipt:
        whole = info.manifest if arrivals is None else arrivals.layout.whole
        names = len(whole.params) + (arrivals.pieces.names if arrivals is not None else 0)
        nbytes = whole.nbytes + (arrivals.nbytes if arrivals is not None else 0)
        tables = arrived.tables if arrived is not None else ()
        digest = digest_json([info.manifest.digest, tables]) if tables else ""
        return Receipt(worker=self._worker, names=names, nbytes=nbytes, digest=digest, tables=tables)

    def commit(self, update: Update, targets: Mapping[str, ServedModel]) -> None:
        """Load what an update has kept apart."""
        assert update.staged is not None
        with (
            _naming(self._name, "finish", update),
            targets[update.target].writing(update.staged.loader, update.manifest),
        ):
            update.commit()
        _synchronize(self.engine.parallel_config.device)

    def _receive_both(self, info: WeightTransferUpdateInfo, update: Update, arrivals: Arrivals) -> list[int]:
        """Receive what goes whole, then what goes by region; return the bytes that came by region, by trainer rank."""
        whole = arrivals.layout.whole
        if whole.params:
            self.engine.receive_weights(attrs.evolve(info, manifest=whole), update)
            update.check()
            info = attrs.evolve(info, timeout=update.deadline.remaining())
        incoming = Incoming(arrivals, update)
        self.engine.receive_regions(info, incoming)
        incoming.finish()
        return incoming.counts

    def _keeping(self, target: str, is_checkpoint_format: bool) -> Keeping:
        key = (target, is_checkpoint_format)
        if key not in self._kept:
            self._kept[key] = Keeping(self._worker, place_of(self.engine.parallel_config.device))
        return self._kept[key]

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
            phases=update.phases.told(),
            link=self._link,
        )
        self._backend.notify("weight_transfer_finished", event)


def _chosen(data: dict[str, Any], targets: Mapping[str, ServedModel]) -> tuple[str, ServedModel]:
    """Return the name of the model that a call is for, and that model."""
    name = data.get("target", MODEL)
    if not isinstance(name, str) or name not in targets:
        raise ManifestMismatchError(
            f"These weights are for target {name!r}, but this worker has {', '.join(map(repr, targets))}; give "
            "the receiver that model, too: WeightReceiver(..., targets={...}).",
            phase="update",
        )
    return name, targets[name]


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


def _synchronize(device: str | None) -> None:
    import torch

    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.current_stream(torch.device(device).index).synchronize()
