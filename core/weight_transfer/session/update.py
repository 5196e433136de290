"""One update on a worker: the guard between an engine and the model's loader."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ManifestMismatchError, PeerLostError, TransferError
from weight_transfer.model.abilities import offers
from weight_transfer.model.info import MODEL, TRAINER_LEFT
from weight_transfer.model.loading import InPlaceLoader, VouchingLoader
from weight_transfer.model.manifest import torch_dtype
from weight_transfer.model.staged_loading import StagedLoader
from weight_transfer.session.phases import Phases
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.events import TransferProgress

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.copying.host import HostCopies
    from weight_transfer.memory.gpu_copies import WeightCopies
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.model.loading import WeightLoader, Weights
    from weight_transfer.model.manifest import Manifest, ParamMeta
    from weight_transfer.session.arrived import Arrived
    from weight_transfer.session.keeping import Arrivals
    from weight_transfer.values.events import Version
    from weight_transfer.values.report import Receipt

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL = 0.1  # seconds
_MANY = 16


class Update:
    """The ``load_weights`` that an engine is given: it lets weights through to the loader, and nothing else.

    It refuses weights after the deadline or an abort, names that are not in the manifest or come twice, wrong shapes
    and dtypes. If the trainer is to compare bytes, it has their digests taken.
    """

    def __init__(self, timeout: float) -> None:
        self.since = time.monotonic()
        self.deadline = Deadline(timeout)
        self.version: Version | None = None
        self.id: str | None = None
        self.target = MODEL
        self.nbytes = 0
        self.params = 0
        self.begun = False
        self.touched = False
        self.complete = False
        self.abort_reason: str | None = None
        self.loader: WeightLoader | None = None
        self.receipt: Receipt | None = None
        self.staged: StagedLoader | None = None
        self.phases = Phases()
        self._backend = ""
        self._done = self._total = 0
        self._told = 0.0

    def begin(
        self,
        info: WeightTransferUpdateInfo,
        progress: Callable[[TransferProgress], None],
        backend: str,
        arrivals: Arrivals | None = None,
        in_place: InPlace | None = None,
        arrived: Arrived | None = None,
    ) -> None:
        """Take the typed info; from here on the engine may load.

        Args:
            info: the update, which `loader` has begun.
            progress: is told how far it is.
            backend: for errors.
            arrivals: what comes by region; None if all comes whole.
            in_place: what the loader's last update of this model has found.
            arrived: notes what arrives; None if nothing is compared.
        """
        self.deadline = Deadline(info.timeout)
        self.version, self.id = info.version, info.update
        self.nbytes = info.manifest.nbytes
        self.params = len(info.manifest.params)
        self.begun = True
        self.manifest = info.manifest
        self._progress = progress
        self._backend = backend
        whole = info.manifest if arrivals is None else arrivals.layout.whole
        self._comes_whole = whole
        self._unaccepted: dict[str, ParamMeta] | None = None
        self._written: int | None = None
        self._to_move = None if arrivals is None else arrivals.layout.by_region
        self._whole = whole.nbytes
        self._total = whole.nbytes + (0 if arrivals is None else arrivals.nbytes)
        self._destinations = (in_place or InPlace()).of(self._begun_loader, whole)
        self._arrived = arrived
        self.staged = self.loader if isinstance(self.loader, StagedLoader) else None
        self._vouching = self.loader if offers(self.loader, VouchingLoader) else None

    @property
    def digest(self) -> str:
        """The digest of its receipt; empty if nothing was compared."""
        return self.receipt.digest if self.receipt is not None else ""

    @property
    def progress(self) -> dict[str, int] | None:
        """How many bytes have come so far of how many, JSON-safe; None before it has begun."""
        return {"done": self._done, "total": self._total} if self._total else None

    def abort(self, reason: str) -> None:
        """Let no further weights through."""
        self.abort_reason = reason

    @property
    def _begun_loader(self) -> WeightLoader:
        assert self.loader is not None
        return self.loader

    def give_up(self, reason: str) -> None:
        """Have the loader put back what is half done. If it cannot, the model counts as touched."""
        if self.loader is None:
            return
        try:
            self.loader.abort(reason, self.touched)
        except Exception:
            self.touched = True
            logger.exception("the loader could not end the update that has failed")

    @property
    def aborted(self) -> bool:
        return self.abort_reason is not None

    def abort_error(self, **fields: Any) -> TransferError:
        """Return the error that says why the update was aborted; a trainer that left is a peer that was lost."""
        reason = str(self.abort_reason).rstrip(".")
        if reason == TRAINER_LEFT:
            return PeerLostError("The trainer closed its connection, or died.", peer="trainer", **fields)
        return TransferError(f"The update was aborted: {reason}.", **fields)

    def check(self, what: str = "receiving weights") -> None:
        """Raise if the deadline has passed or the update was aborted; ``what`` is being done."""
        if self.aborted:
            raise self.abort_error(phase="update", version=self.version)
        self.deadline.check(what, phase="update", backend=self._backend)

    def destinations(self) -> Mapping[str, Tensor] | None:
        """Return the worker's own tensors of what comes whole, by name, if the loader only copies; else None.

        An engine that writes there calls `write_in_place` first.
        """
        return self._destinations

    def write_in_place(self, names: Iterable[str] | None = None) -> None:
        """Say that bytes are about to be written into the worker's tensors; raises like `check`, or if they moved."""
        self.check()
        if self._vouching is not None:
            self._vouching.vouch(names)
        self.touched = True

    def written(self, nbytes: int, names: Iterable[str] = ()) -> None:
        """Say that bytes of `destinations` have been written; `finish` counts them. ``names`` are whole now."""
        self.check()
        if self._arrived is not None and self._destinations is not None:
            with self.phases.within("verify"):
                self._arrived.take_written(names, self._destinations)
        self._count(nbytes)

    def copy(self, copies: HostCopies | WeightCopies, names: Sequence[str]) -> None:
        """Run copies into `destinations`, of whole weights in the order of ``names``, with all that goes with them."""
        self.write_in_place(names)
        if self._arrived is None or self._destinations is None:
            copies.run()
        else:
            self._arrived.copy(copies, names, self._destinations)
        self.check()
        self._count(sum(copies.nbytes))

    def _count(self, nbytes: int) -> None:
        self._written = (self._written or 0) + nbytes
        self.moved(nbytes)

    def moved(self, nbytes: int) -> None:
        """Say that bytes of what comes by region have been written."""
        self.touched = True
        self._done += nbytes
        self._tell()

    def all_moved(self) -> None:
        """Say that all that was to come by region has come."""
        self._to_move = None

    def __call__(self, weights: Weights) -> None:
        self.check()
        in_place = self._accept_in_place(weights)
        if not in_place:
            for name, tensor in weights:
                self._accept(name, tensor)
        if self._arrived is not None:
            with self.phases.within("verify"):
                self._arrived.take(weights, in_place=in_place)
        self.touched = self.touched or self.staged is None
        if not in_place:
            with self.phases.within("load"):
                self._begun_loader(weights)
        self._tell()

    def finish(self) -> None:
        """Raise unless every parameter was loaded and the deadline has not passed."""
        self.check()
        if self._written is not None:
            self._count_written(self._written)
        missing = [*self._missing, *(self._to_move.by_name if self._to_move is not None else ())]
        if missing:
            raise ManifestMismatchError(
                f"{len(missing)} of {self.params} parameters did not arrive, such as {missing[0]!r}.",
                phase="update",
                version=self.version,
            )
        if self._arrived is not None:
            with self.phases.within("verify"):
                self._arrived.end()
        with self.phases.within("load"):
            self._begun_loader.finish()
        if self.staged is None:
            self._read_back()
        self.complete = True

    def commit(self) -> None:
        """Load what was kept apart, if it was; nobody samples."""
        if self.staged is not None:
            self.touched = True
            self.staged.commit()
            self._read_back()

    def _read_back(self) -> None:
        if self._arrived is not None and self._arrived.reads_back:
            with self.phases.within("verify"):
                self._arrived.read_back()

    def _count_written(self, written: int) -> None:
        """See that what was written in place are the bytes of all that was not handed over."""
        handed_over = self._unaccepted is not None
        left = sum(param.nbytes for param in self._missing.values()) if handed_over else self._whole
        if written != left:
            raise ManifestMismatchError(
                f"{written} bytes were written in place where {left} of the manifest were to come.",
                phase="update",
                version=self.version,
            )
        if self._arrived is not None:
            assert self._destinations is not None
            with self.phases.within("verify"):
                self._arrived.take_left(self._destinations)
        self._unaccepted = {}

    @property
    def _missing(self) -> dict[str, ParamMeta]:
        """What was not handed over yet, by name; never asked for, and so never made, if all is written in place."""
        if self._unaccepted is None:
            self._unaccepted = dict(self._comes_whole.by_name)
        return self._unaccepted

    def _accept_in_place(self, weights: Weights) -> bool:
        """Accept all of ``weights`` at once if they are the worker's own tensors, whose forms the loader has checked.

        Thousands of tensors cost less than one by one, and there is nothing left to load.
        """
        destinations = self.destinations()
        if destinations is None or len(weights) < _MANY:
            return False
        by_name = dict(weights)
        if len(by_name) < len(weights) or not by_name.keys() <= self._missing.keys():
            return False
        if not all(map(operator.is_, by_name.values(), map(destinations.get, by_name))):
            return False
        if len(by_name) == len(self._missing):
            self._missing.clear()
            self._done = self._whole
        else:
            self._done += sum(self._missing.pop(name).nbytes for name in by_name)
        return True

    def _accept(self, name: str, tensor: Tensor) -> None:
        meta = self._missing.pop(name, None)
        if meta is None:
            raise ManifestMismatchError(f"Parameter {name!r} arrived twice or is not in the manifest.", phase="update")
        if tensor.shape != meta.shape or tensor.dtype is not torch_dtype(meta.dtype):
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ManifestMismatchError(f"Parameter {meta} arrived as {got}.", phase="update", version=self.version)
        self._done += meta.nbytes

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= _PROGRESS_INTERVAL or self._done == self._total:
            self._told = now
            self._progress(
                TransferProgress(
                    role="worker", backend=self._backend, version=self.version, done=self._done, total=self._total
                )
            )


class InPlace:
    """Where weights may be written directly, kept from update to update."""

    def __init__(self) -> None:
        self._known: tuple[object, object, Mapping[str, Tensor] | None] = (None, None, None)

    def of(self, loader: WeightLoader, whole: Manifest) -> Mapping[str, Tensor] | None:
        """Return where all of some weights may be written, which ``loader`` has begun; None if one of them may not."""
        found = loader.destinations() if offers(loader, InPlaceLoader) else None
        if found is None:
            return None
        if not (found is self._known[0] and whole is self._known[1]):
            self._known = found, whole, found if whole.by_name.keys() <= found.keys() else None
        return self._known[2]
