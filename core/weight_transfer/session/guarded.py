"""The guard between a source and an engine: what is sent is what the manifest says, and every pass is finished."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from weight_transfer.errors import ManifestMismatchError, TransferError, TransferTimeoutError, WeightTransferError
from weight_transfer.model.casting import CastSource
from weight_transfer.model.manifest import dtype_name, torch_dtype
from weight_transfer.model.partial import PartialSource
from weight_transfer.model.selection import SelectedSource
from weight_transfer.model.sharded_source import ShardedSource
from weight_transfer.model.shards import Shard
from weight_transfer.model.source import ModuleSource, WeightSource
from weight_transfer.model.state import lack_of_memory
from weight_transfer.session.watching import Watcher
from weight_transfer.values.deadline import LONG

if TYPE_CHECKING:
    from weight_transfer.model.manifest import Manifest, ParamMeta
    from weight_transfer.session.sent import Sent
    from weight_transfer.values.events import Version


logger = logging.getLogger(__name__)

_watcher = Watcher()


class GuardedSource(WeightSource):
    """Wraps a source for one update.

    Name, dtype and shape of each tensor are compared with the manifest before an engine sees it, so that no source can
    send one weight under the name of another. The pass is always finished, so that the other trainer ranks are never
    left in a collective.

    Args:
        source: what is sent.
        manifest: the manifest of this update.
        sent: takes note of what passes; None if nothing is compared.

    Attributes:
        update: an id of the weights of this update.
        error: what the source raised, if it failed; engines may take it for something else.
        seconds: that the source has taken to yield weights which it reads or makes whole.
    """

    def __init__(self, source: WeightSource, manifest: Manifest, sent: Sent | None = None) -> None:
        self.update = secrets.token_hex(8)
        self._source = source
        self._manifest = manifest
        self._sent = sent
        self._begun = False
        self._stream: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._current: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._left = 0
        self._asked: float | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0

    def manifest(self) -> Manifest:
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._begun = True
        self._current = self._checked()
        return self._current

    def resident(self) -> Mapping[str, torch.Tensor]:
        """Return the source's, in the manifest's order.

        Raises:
            ManifestMismatchError: one is not in the manifest, or not of the dtype and shape there.
        """
        resident = self._source.resident()
        if self._reads_once:
            return resident
        try:
            return _in_order(resident, self._manifest)
        except ManifestMismatchError as error:
            self.error = error
            raise

    def masters(self) -> Mapping[str, torch.Tensor]:
        """Return the source's.

        Raises:
            ManifestMismatchError: one is not in the manifest, or not of the shape there.
        """
        masters = self._source.masters()
        if self._reads_once:
            return masters
        for name, tensor in masters.items():
            param = self._manifest.by_name.get(name)
            if param is None or param.shape != tensor.shape:
                self.error = _mismatch(f"has the master {name}: {list(tensor.shape)}, which its manifest has not")
                raise self.error
        return masters

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """Return the source's, in the manifest's order.

        Raises:
            ManifestMismatchError: one is of no weight in the manifest, lies beyond it, or has a tensor of another shape
                than its region, or of a dtype that is not cast to the weight's.
        """
        shards = self._source.shards()
        if self._reads_once:
            return shards
        try:
            return _shards_in_order(shards, self._manifest)
        except ManifestMismatchError as error:
            self.error = error
            raise

    @property
    def _reads_once(self) -> bool:
        """Whether all that the source says comes of one reading; a module's subclass may have changed some of it."""
        source = self._source
        while type(source) in (CastSource, PartialSource, SelectedSource):
            source = source.source  # type: ignore[attr-defined]
        return type(source) in (ModuleSource, ShardedSource)

    @property
    def _makes(self) -> bool:
        """Whether the source reads or gathers what it yields, which takes a while."""
        return self.collective or not self._reads_once

    @property
    def device(self) -> str:
        return self._source.device

    @property
    def collective(self) -> bool:
        return self._source.collective

    @property
    def whole(self) -> bool:
        return self._source.whole

    @property
    def reuses_memory(self) -> bool:
        return self._source.reuses_memory

    def finish(self) -> None:
        """See that nothing follows the last weight, if an engine has taken all of them.

        Raises:
            ManifestMismatchError: another one does.
        """
        if not self._left:
            for _ in self._current:
                pass

    def drain(self) -> None:
        """Finish the pass, or run it if it has not begun, if the source runs collectives.

        Raises:
            ManifestMismatchError: the pass that it runs is not of the manifest's weights; it has ended all the same.
        """
        if not self.collective:
            return
        try:
            for _ in () if self._begun else self:
                pass
        finally:
            for _ in self._stream:
                pass

    def named(self, error: BaseException, backend: str, version: Version | None) -> BaseException:
        """Give an error its context; see `named`."""
        return named(error, backend, version, own=error is self.error)

    def _checked(self) -> Iterator[tuple[str, torch.Tensor]]:
        params = self._manifest.params
        self._left = len(params)
        makes = self._makes  # asked for each weight
        try:
            self._asked = asked = time.monotonic()
            self._stream = iter(self._source)
            for name, tensor in self._stream:
                self._asked = None
                if makes:
                    self.seconds += time.monotonic() - asked
                if not self._left:
                    raise _mismatch(f"yielded {name!r} after the last weight of its manifest")
                _require(params[-self._left], name, tensor, "yielded")
                self._left -= 1
                bits = tensor.resolve_conj().resolve_neg()
                if self._sent is not None:
                    self._sent.passes(name, bits)
                yield name, bits
                self._asked = asked = time.monotonic()
            self._asked = None
            if self._left:
                raise _mismatch(f"ended before {params[-self._left]}")
        except Exception as error:
            self.error = error
            raise
        finally:
            self._asked = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Log, inside a ``with`` block, if the source does not yield for long: a rank that does not gather, say."""
        if not self._makes:  # its weights are there
            yield
            return
        told = False

        def look() -> None:
            nonlocal told
            asked, params = self._asked, self._manifest.params
            if told or asked is None or time.monotonic() - asked <= LONG:
                return
            told = True
            awaited = params[-self._left].name if self._left else "its end"
            hint = "; every trainer rank has to call send with the same model" if self.collective else ""
            logger.warning("waiting for the source of the weights to yield %s%s", awaited, hint)

        with _watcher.watching(look, LONG / 2):
            yield


def named(error: BaseException, backend: str, version: Version | None, *, own: bool = False) -> BaseException:
    """Give an error its context, and a foreign exception its place in the tree; the trainer's one such boundary.

    Args:
        error: what was raised.
        backend: of the update.
        version: of the update, as far as it is known.
        own: whether the trainer's source raised it, and no worker is at fault.
    """
    if isinstance(error, TransferError):
        if own:
            error.peer, error.phase = error.peer or "trainer", error.phase or "update"
        error.backend = error.backend or backend
        error.version = version if error.version is None else error.version
    if isinstance(error, WeightTransferError) or not isinstance(error, Exception):
        return error
    kind = TransferTimeoutError if isinstance(error, TimeoutError) else TransferError
    cause = f"{type(error).__name__}: {error}"
    message = "The source of the weights failed." if own else "The trainer failed to send its weights."
    side = {"peer": "trainer", "phase": "update"} if own else {}
    found = kind(message, backend=backend, version=version, cause=cause, **side)
    found.__cause__ = error
    return found


def _in_order(resident: Mapping[str, torch.Tensor], manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """Return a copy in the manifest's order: engines know by the object whether it has changed."""
    extra = next((name for name in resident if name not in manifest.by_name), None)
    if extra is not None:
        raise _mismatch(f"has {extra!r} resident, which is not in its manifest")
    ordered = {param.name: resident[param.name] for param in manifest.params if param.name in resident}
    for name, tensor in ordered.items():
        _require(manifest.by_name[name], name, tensor, "has resident")
    return ordered


def _require(param: ParamMeta, name: str, tensor: object, verb: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise _mismatch(f"{verb} a {type(tensor).__name__} where its manifest has {param}")
    if name != param.name or tensor.dtype is not torch_dtype(param.dtype) or tensor.shape != param.shape:
        raise _mismatch(
            f"{verb} {name}: {dtype_name(tensor.dtype)} {list(tensor.shape)} where its manifest has {param}"
        )
    _require_bytes(name, tensor, verb)


def _shards_in_order(shards: Mapping[str, Sequence[Shard]], manifest: Manifest) -> Mapping[str, Sequence[Shard]]:
    """Return a copy in the manifest's order, as of what is resident."""
    extra = next((name for name in shards if name not in manifest.by_name), None)
    if extra is not None:
        raise _mismatch(f"has shards of {extra!r}, which is not in its manifest")
    ordered = {param.name: tuple(shards[param.name]) for param in manifest.params if param.name in shards}
    for name, own in ordered.items():
        for shard in own:
            _require_shard(manifest.by_name[name], shard)
    return ordered


def _require_shard(param: ParamMeta, shard: object) -> None:
    if not isinstance(shard, Shard) or not isinstance(shard.tensor, torch.Tensor):
        held = shard.tensor if isinstance(shard, Shard) else shard
        raise _mismatch(f"has a {type(held).__name__} for a shard of {param}")
    region, tensor, dtype = shard.region, shard.tensor, torch_dtype(param.dtype)
    is_cast = tensor.dtype.is_floating_point and dtype.is_floating_point
    if not region.fits(param.shape):
        raise _mismatch(f"has a shard {region} that lies beyond {param}")
    if tensor.shape != region.shape or not (is_cast or tensor.dtype is dtype):
        raise _mismatch(
            f"has {dtype_name(tensor.dtype)} {list(tensor.shape)} for the shard {region} of {param}; a shard's tensor "
            "has the shape of its region and the dtype of its weight, or one that is cast to it"
        )
    _require_bytes(param.name, tensor, "has a shard of")


def _require_bytes(name: str, tensor: torch.Tensor, verb: str) -> None:
    if tensor.is_meta or tensor.layout is not torch.strided:
        what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise _mismatch(f"{verb} {name!r} {what}; a weight needs its bytes, densely")
    lack = lack_of_memory(tensor)
    if lack:
        raise _mismatch(f"{verb} {name!r}, which {lack}")


def _mismatch(what: str) -> ManifestMismatchError:
    return ManifestMismatchError(f"The source of the weights {what}.", phase="update", peer="trainer")
