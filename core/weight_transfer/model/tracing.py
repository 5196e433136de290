"""A mode of torch in which a loader runs over tensors without bytes, and what it would write is noted, not written.

Sources are plain tensors on the ``meta`` device, so torch itself works out the geometry of every view. The mode sees
the operations below that: a copy from a view of a source into a view of a target is what a recording is made of; so is
a fill. A copy of a source that stays one (``clone``, ``contiguous``, ``to``) is followed. What is computed from sources
is traced, so that it is known which sources a target depends on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from weight_transfer.model.manifest import ParamMeta, dtype_name, torch_dtype
from weight_transfer.model.operations import extent_of, on_meta, operation_name, storage_key, tensors_in, written_by
from weight_transfer.model.origins import Origin, Taint, in_source
from weight_transfer.model.recording import MAX_DIMS, RecordedCopy, RecordedFill
from weight_transfer.model.strided import Strided, coalesce

_aten = torch.ops.aten
_NO_ARGUMENTS: Mapping[str, Any] = {}
_Call = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


@attrs.frozen(eq=False)
class _Owner:
    """A target, in its storage; ``begin`` and ``end`` in bytes; whether it is all of that."""

    name: str
    tensor: torch.Tensor
    begin: int
    end: int
    is_whole: bool

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Owner:
        begin, end = extent_of(tensor)
        return cls(name, tensor, begin, end, begin == 0 and end == tensor.untyped_storage().nbytes())

    def holds(self, view: torch.Tensor) -> bool:
        """Whether no element of a view in this storage lies before or behind the target."""
        if self.is_whole:
            return True
        begin, end = extent_of(view)
        return self.begin <= begin and end <= self.end

    def touches(self, view: torch.Tensor) -> bool:
        """Whether elements of a view in this storage may be the target's."""
        begin, end = extent_of(view)
        return self.begin < end and begin < self.end


class Trace(TorchDispatchMode):
    """One run of a loader. Nothing is written into a target, or into what a copy of a source would have gone to.

    Args:
        targets: the model's own tensors by name.

    Attributes:
        writes: copies and fills by target, in order.
        refused: by target: why it cannot be recorded, and which sources were seen to be involved in that.
        looked: of each source of an operation that could not be done without bytes, the reason.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: defaultdict[str, list[RecordedCopy | RecordedFill]] = defaultdict(list)
        self.refused: dict[str, tuple[str, set[str]]] = {}
        self.looked: dict[str, str] = {}
        self._owners: defaultdict[int, list[_Owner]] = defaultdict(list)
        self._origins: dict[int, Origin] = {}
        self._taints: dict[int, Taint] = {}
        self._constants: dict[int, bool | int | float] = {}
        self._known: tuple[Mapping[int, object], ...] = self._origins, self._taints, self._owners, self._constants
        self._storages: list[tuple[int, StorageWeakRef]] = []  # the address of none of them is used again meanwhile
        self._calls: dict[Any, _Call] = {}
        for name, tensor in targets.items():
            self._owners[storage_key(tensor)].append(_Owner.of(name, tensor))

    def source(self, param: ParamMeta) -> torch.Tensor:
        """Return a tensor without bytes that stands for a source."""
        dtype = torch_dtype(param.dtype)
        tensor = torch.empty(param.shape, dtype=dtype, device="meta")
        self._origins[self._watch(tensor)] = Origin(param.name, dtype)
        return tensor

    def kept(self) -> dict[str, str]:
        """Return the sources that somebody still holds, or something made of them, by name, and what that is."""
        found: dict[str, str] = {}
        for key, storage in self._storages:
            if key in self._constants or storage.expired():
                continue
            taint = self._taints.get(key)
            if taint is not None:
                found |= dict.fromkeys(sorted(taint.sources), taint.reason)
            elif key in self._origins:
                name = self._origins[key].source
                found.setdefault(name, f"{name!r} is kept")
        return found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method below in one that imports its compiler, and takes as long again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = self._calls.get(func)
        if call is None:
            call = self._calls[func] = self._call_for(func)
        return call(func, args, kwargs or _NO_ARGUMENTS)

    def _call_for(self, func: Any) -> _Call:
        special: dict[Any, _Call] = {
            _aten.copy_.default: self._copy_,
            _aten._foreach_copy_.default: self._foreach_copy_,
            _aten.fill_.Scalar: self._fill_,
            _aten.fill_.Tensor: self._fill_,
            _aten.zero_.default: self._fill_,
            _aten.clone.default: self._duplicate,
            _aten._to_copy.default: self._duplicate,
            _aten.scalar_tensor.default: self._constant,
            _aten.lift_fresh.default: self._constant,
        }
        if func in special:
            return special[func]
        if func._can_decompose():  # seen whole in inference mode alone
            return self._decompose
        aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info]
        if aliases and not any(alias.is_write for alias in aliases):
            return _view
        return self._other

    def _decompose(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with self:
            return func.decompose(*args, **kwargs)

    def _constant(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Remember the value of a literal, which torch makes a tensor of its own."""
        result, value = func(*args, **kwargs), args[0]
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if isinstance(value, bool | int | float):
            self._constants[self._watch(result)] = torch.tensor(value, dtype=result.dtype).item()
        return result

    def _copy_(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        to, frm = args[0], args[1]
        key = storage_key(frm)
        origin, taint = self._origins.get(key), self._taints.get(key)
        owners = self._owners_of(to)
        if not owners:
            if origin is None and taint is None:
                return self._other(func, args, kwargs)
            reason = "" if origin is None else f"{origin.source!r} is copied to somewhere else first"
            self._taint(to, taint or Taint(reason, _names(origin)))
            return to
        if frm.shape != to.shape:
            frm = frm.expand(to.shape)  # raises if they do not fit
        if taint is not None:
            self._refuse(owners, taint.reason, taint.sources)
        elif origin is not None:
            self._copied(owners, to, frm, origin)
        elif key in self._constants:
            self._filled(owners, to, self._constants[key])
        else:
            stale = self._stale(frm)
            self._refuse(owners, "it is written from a tensor that is no source", self._sources_of(stale))
        return to

    def _foreach_copy_(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for to, frm in zip(args[0], args[1], strict=True):
            self._copy_(_aten.copy_.default, (to, frm), {})

    def _fill_(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        to = args[0]
        value = args[1] if len(args) > 1 else 0
        if isinstance(value, torch.Tensor):
            return self._copy_(_aten.copy_.default, (to, value), {})
        owners = self._owners_of(to)
        if owners:
            self._filled(owners, to, value)
            return to
        key = storage_key(to)
        if key not in self._origins or to.nbytes != to.untyped_storage().nbytes():
            return self._other(func, args, kwargs)
        del self._origins[key]  # a source, or a copy of one, that is nothing but this value from now on
        self._constants[key] = torch.tensor(value, dtype=to.dtype).item()
        return to

    def _copied(self, owners: Sequence[_Owner], to: torch.Tensor, frm: torch.Tensor, origin: Origin) -> None:
        target, reason = owners[0].tensor, ""
        if len(owners) > 1 or not owners[0].holds(to):
            reason = f"{origin.source!r} is copied into it and other memory at once"
        elif frm.is_conj() or frm.is_neg() or to.is_conj() or to.is_neg():
            reason = f"{origin.source!r} is conjugated or negated"
        elif frm.dtype is not origin.dtype or to.dtype is not target.dtype:
            same_bits = frm.dtype is to.dtype and not origin.casts and origin.dtype is target.dtype
            if not same_bits or frm.element_size() != target.element_size():
                reason = f"{origin.source!r} is copied bit by bit as another dtype"
        elif origin.casts and origin.dtype is not target.dtype:
            reason = f"{origin.source!r} is converted to {dtype_name(origin.dtype)} on its way"
        if not reason:
            views = in_source(Strided.of(to, int(target.storage_offset())), Strided.of(frm), origin)
            if views is not None and len(views[0].shape) <= MAX_DIMS:
                if views[0].numel:
                    to_view, from_view = views
                    casts = origin.casts or origin.dtype is not target.dtype
                    copy = RecordedCopy(owners[0].name, to_view, origin.source, from_view, casts)
                    self.writes[copy.target].append(copy)
                return
            reason = f"{origin.source!r} is copied in an order that has no even steps"
        self._refuse(owners, reason, _names(origin))

    def _filled(self, owners: Sequence[_Owner], to: torch.Tensor, value: Any) -> None:
        owner = owners[0]
        if (
            len(owners) > 1
            or not owner.holds(to)
            or to.dtype is not owner.tensor.dtype
            or not isinstance(value, bool | int | float)
        ):
            self._refuse(owners, f"it is filled with {value!r} as another dtype, or with other memory at once")
            return
        (view,) = coalesce(Strided.of(to, int(owner.tensor.storage_offset())))
        if len(view.shape) > MAX_DIMS:
            self._refuse(owners, "it is filled in an order that has no even steps")
        elif view.numel:
            self.writes[owner.name].append(RecordedFill(owner.name, view, value))

    def _duplicate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Follow a copy that changes at most the dtype, once."""
        tensor = args[0]
        origin = self._origins.get(storage_key(tensor))
        dtype = kwargs.get("dtype") or tensor.dtype
        converted = dtype is not tensor.dtype
        if (
            origin is None
            or tensor.dtype is not origin.dtype
            or (converted and origin.casts)
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return self._other(func, args, kwargs)
        result = on_meta(func, args, kwargs)
        base = origin, Strided.of(tensor)
        key = self._watch(result)
        self._origins[key] = Origin(origin.source, dtype, origin.casts or converted, Strided.of(result), base)
        return result

    def _other(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run what is no copy and no fill: for real if no source is involved, and no target written."""
        keys = dict.fromkeys(map(storage_key, tensors_in((args, kwargs))))
        if not any(key in known for known in self._known for key in keys):
            return func(*args, **kwargs)
        origins = [self._origins[key] for key in keys if key in self._origins]
        taints = [self._taints[key] for key in keys if key in self._taints]
        changed = written_by(func, args, kwargs)
        written = any(storage_key(tensor) in self._owners for tensor in changed)
        stale = [name for tensor in tensors_in((args, kwargs)) for name in self._stale(tensor)]
        if not (origins or taints or written or stale):
            for tensor in changed:
                self._constants.pop(storage_key(tensor), None)
            return func(*args, **kwargs)
        sources = _union(*map(_names, origins), *(taint.sources for taint in taints), self._sources_of(stale))
        reason = taints[0].reason if taints else f"{operation_name(func)} computes with {_called(sources)}"
        for tensor in changed:
            if storage_key(tensor) in self._owners:
                self._refuse(self._owners_of(tensor), reason, sources)
            else:
                self._taint(tensor, Taint(reason, sources))
        try:
            result = on_meta(func, args, kwargs)
        except Exception as error:
            self.looked |= dict.fromkeys(sorted(sources), f"the loader looks into it: {type(error).__name__}: {error}")
            raise
        return self._traced(result, Taint(reason, sources))

    def _stale(self, tensor: torch.Tensor) -> list[str]:
        """Return the targets in a tensor which do not hold what the loader believes to have written."""
        names = [owner.name for owner in self._owners_of(tensor)]
        return [name for name in names if name in self.writes or name in self.refused]

    def _sources_of(self, targets: Iterable[str]) -> frozenset[str]:
        """Return what has been copied into targets, or went into their refusal."""
        writes = [write for name in targets for write in self.writes.get(name, ())]
        refused = [self.refused[name][1] for name in targets if name in self.refused]
        return frozenset(write.source for write in writes if isinstance(write, RecordedCopy)).union(*refused)

    def _traced(self, result: Any, taint: Taint) -> Any:
        for tensor in tensors_in(result):
            if not self._is_known(tensor):
                self._taint(tensor, taint)
        return result

    def _taint(self, tensor: torch.Tensor, taint: Taint) -> None:
        key = self._watch(tensor)
        before = self._taints.get(key)
        more = _names(self._origins.pop(key, None)) | (before.sources if before is not None else frozenset())
        self._constants.pop(key, None)
        self._taints[key] = Taint(taint.reason, taint.sources | more)

    def _refuse(self, owners: Iterable[_Owner], reason: str, sources: Iterable[str] = ()) -> None:
        for owner in owners:
            self.refused.setdefault(owner.name, (reason, set()))[1].update(sources)

    def _owners_of(self, view: torch.Tensor) -> Sequence[_Owner]:
        """Return the targets in whose extents elements of a view lie."""
        owners = self._owners.get(storage_key(view))
        if not owners:
            return ()
        if len(owners) == 1 and owners[0].holds(view):
            return owners
        return [owner for owner in owners if owner.touches(view)]

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = storage_key(tensor)
        return any(key in known for known in self._known)

    def _watch(self, tensor: torch.Tensor) -> int:
        key = storage_key(tensor)
        self._storages.append((key, StorageWeakRef(tensor.untyped_storage())))
        return key


def _view(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def _union(*sources: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*sources)


def _names(origin: Origin | None) -> frozenset[str]:
    return frozenset() if origin is None else frozenset((origin.source,))


def _called(sources: frozenset[str]) -> str:
    if not sources:
        return "what it holds"
    first, *others = sorted(sources)
    if len(others) == 1:
        return f"{first!r} and {others[0]!r}"
    return f"{first!r} and {len(others)} more" if others else repr(first)
