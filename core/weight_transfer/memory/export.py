"""Which of a process's tensors lie in shared memory, and where; for backends that let another process at them.

*Adopting* a parameter moves its bytes into shared memory and points ``parameter.data`` there: the optimiser goes on
updating the same Parameter object, and other processes see every step without another copy. That is only done where it
is safe: the parameter's storage must belong to the module's own tensors alone. A storage that something else refers to
(a flat buffer, a view that somebody keeps, a process that shares it) would be left behind silently, so its tensors are
*staged*: copied at each update. So are pinned tensors, which would lose that, and those whose values are not their
bytes.

Adopted storages can be resized like any other: their tensors then leave the segment, and are adopted anew at the next
update. So they are after a fork, which parts the segment (`shared_memory`).

Adopted tensors lie one after another in the order in which they were given, each storage aligned to 256 bytes: like the
buckets of `plan_buckets`, so that neighbours stay neighbours on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from weakref import ref

import attrs
import torch

from weight_transfer.memory.shared_memory import SharedMemory
from weight_transfer.model.manifest import Manifest, dtype_name, torch_dtype
from weight_transfer.plan.buckets import ALIGNMENT


@attrs.frozen
class Segment:
    """One piece of shared memory: its id within the trainer, and its size in bytes."""

    id: int
    nbytes: int


@attrs.frozen
class Export:
    """Where each parameter lies, as columns in the manifest's order; JSON-safe as a field of an update info.

    Attributes:
        segments: the segments in use.
        segment_ids: the parameter's segment; -1 if it is staged.
        offsets: its first element, in bytes from the segment's start.
        strides: its strides in elements, for those that are not contiguous, by index in the manifest as text.
        dtypes: its dtype's name, for those that lie there in another one than the manifest's, by index as text.
    """

    segments: tuple[Segment, ...]
    segment_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    strides: dict[str, tuple[int, ...]]
    dtypes: dict[str, str] = attrs.field(factory=dict)

    def staged(self, manifest: Manifest) -> Manifest:
        """Return the part of ``manifest`` that lies in no segment."""
        return Manifest(param for param, segment in zip(manifest.params, self.segment_ids, strict=True) if segment < 0)

    def views(self, manifest: Manifest, memory: Mapping[int, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Return the exported parameters as tensors over ``memory`` (bytes by segment id).

        Raises:
            RuntimeError: a parameter does not lie within its segment.
        """
        views = []
        for index, param in enumerate(manifest.params):
            if self.segment_ids[index] < 0:
                continue
            dtype = torch_dtype(self.dtypes.get(str(index), param.dtype))
            data = memory[self.segment_ids[index]][self.offsets[index] :]
            strides = self.strides.get(str(index))
            if strides is None:
                view = data[: math.prod(param.shape) * dtype.itemsize].view(dtype).view(param.shape)
            else:
                whole = data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
                view = whole.as_strided(param.shape, strides)
            views.append((param.name, view))
        return views


class Exporter:
    """Finds tensors in this process's shared memory, and adopts the others where it may.

    Tensors that an earlier exporter adopted are found where they are.

    Args:
        adopt: whether parameters may be moved; if not, everything is staged.

    Attributes:
        moved: whether the last `refresh` has moved tensors. What was known of their places before it is old, so that a
            source, which looks when an update begins, may say that nothing has moved although something has.
    """

    def __init__(self, adopt: bool) -> None:
        self.moved = False
        self._adopt = adopt
        self._ids = count(1)
        self._segments: dict[int, SharedMemory] = {}
        self._signature: tuple[object, ...] = ()
        self._export = Export((), (), (), {})

    def refresh(
        self,
        manifest: Manifest,
        resident: Mapping[str, torch.Tensor],
        companions: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> Export:
        """Return where the weights are now, in whichever dtypes they lie; the same object while nothing moved.

        New or reallocated parameters are adopted, segments that no parameter uses any more are dropped.

        Args:
            manifest: the weights.
            resident: their tensors, by name.
            companions: returns tensors that may refer to the same storages, and then move with them.
        """
        self.moved = False
        if not self.parted and self._signature == _sign(manifest, resident):
            return self._export
        self._segments = {home: segment for home, segment in self._segments.items() if not segment.parted}
        if self._adopt:
            self._find(list(resident.values()))
            homeless = [tensor for tensor in resident.values() if not self._home(tensor)]
            if homeless:
                self._adopt_all(homeless, companions())
        self._export = self._describe(manifest, resident)
        self._signature = _sign(manifest, resident)
        return self._export

    @property
    def parted(self) -> bool:
        """Whether this process has forked since `refresh`, so that others do not see the adopted weights any more."""
        return any(segment.parted for segment in self._segments.values())

    def segment(self, segment_id: int) -> SharedMemory:
        """Return a segment in use."""
        return self._segments[segment_id]

    def close(self) -> None:
        """Let go of the segments. The parameters keep the memory they live in."""
        self._segments.clear()
        self._signature = ()

    def _describe(self, manifest: Manifest, resident: Mapping[str, torch.Tensor]) -> Export:
        ids, offsets, strides, dtypes = [], [], {}, {}
        for index, param in enumerate(manifest.params):
            tensor = resident.get(param.name)
            home = self._home(tensor) if tensor is not None else 0
            ids.append(home or -1)
            offsets.append(tensor.data_ptr() - self._segments[home].address if tensor is not None and home else 0)
            if tensor is not None and home and not tensor.is_contiguous():
                strides[str(index)] = tensor.stride()
            if tensor is not None and home and dtype_name(tensor.dtype) != param.dtype:
                dtypes[str(index)] = dtype_name(tensor.dtype)
        for unused in self._segments.keys() - set(ids):
            del self._segments[unused]
        segments = tuple(Segment(home, segment.nbytes) for home, segment in self._segments.items())
        return Export(segments, tuple(ids), tuple(offsets), strides, dtypes)

    def _home(self, tensor: torch.Tensor) -> int:
        """Return the id of the segment in which a tensor lies, 0 if in none."""
        if tensor.device.type == "cpu" and tensor.numel():
            address = tensor.untyped_storage().data_ptr()
            for home, segment in self._segments.items():
                if segment.holds(address):
                    return home
        return 0

    def _find(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take in the segments where tensors lie already."""
        known = {id(segment) for segment in self._segments.values()}
        others = [memory for memory in SharedMemory.segments() if id(memory) not in known and not memory.parted]
        for segment in others:
            if any(tensor.device.type == "cpu" and segment.holds(tensor.data_ptr()) for tensor in tensors):
                self._segments[next(self._ids)] = segment

    def _adopt_all(self, tensors: Sequence[torch.Tensor], companions: Iterable[torch.Tensor]) -> None:
        groups = [group for group in _by_storage(tensors, companions) if _is_adoptable(group)]
        sizes = [-(-group[0].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT for group in groups]
        if not groups:
            return
        self.moved = True
        segment = self._segments[next(self._ids)] = SharedMemory(sum(sizes), parts=True)
        offset = 0
        for group, nbytes in zip(groups, sizes, strict=True):
            _move(group, segment.storage(offset, group[0].untyped_storage().nbytes()))
            offset += nbytes


def _sign(manifest: Manifest, resident: Mapping[str, torch.Tensor]) -> tuple[object, ...]:
    return manifest.digest, [(tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in resident.values()]


def _by_storage(tensors: Iterable[torch.Tensor], companions: Iterable[torch.Tensor] = ()) -> list[list[torch.Tensor]]:
    """Return the tensors by storage, with those companions that share one of these."""
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_identity(tensor), {})[id(tensor)] = tensor
    for tensor in companions:
        if (key := _identity(tensor)) in groups:
            groups[key][id(tensor)] = tensor
    return [list(group.values()) for group in groups.values()]


def _identity(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata  # noqa: SLF001  (torch has no public name for it)
    return identity


def _is_adoptable(group: Sequence[torch.Tensor]) -> bool:
    """Whether these tensors are all that refers to their storage, and the storage is torch's own, or was adopted."""
    if not all(_is_plain(tensor) for tensor in group):
        return False
    storage = group[0].untyped_storage()
    if storage.is_shared() or not _is_held_by(group, storage):
        return False
    return _is_adopted(storage) or (storage.resizable() and not group[0].is_pinned())


def _is_plain(tensor: torch.Tensor) -> bool:
    if type(tensor) not in _PLAIN or tensor.device.type != "cpu" or not tensor.numel():
        return False
    return not (tensor.is_conj() or tensor.is_neg())


def _is_held_by(group: Sequence[torch.Tensor], storage: torch.UntypedStorage) -> bool:
    """Whether nothing but these tensors, and ``storage`` itself, refers to a storage."""
    references: int = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001  (torch has no public way to ask)
    return references == len(group) + 1


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _move(group: Sequence[torch.Tensor], target: torch.Tensor) -> None:
    """Copy a storage to ``target`` and point its tensors there. The old one is freed with its last tensor."""
    target.copy_(_bytes_of(group[0].untyped_storage()))
    _point(group, target.untyped_storage())
    storage = group[0].untyped_storage()
    setattr(storage, _RESIZE, _Resizing(group))


def _point(group: Sequence[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Let tensors have their elements in another storage of the same size."""
    for tensor in group:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # what is set decides what the tensor is
            elements = torch.empty(0, dtype=tensor.dtype)
            elements.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = elements


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_RESIZE = "resize_"


class _Resizing:
    """The ``resize_`` of an adopted storage: torch itself resizes only what its own allocator gave.

    The tensors go to a storage of torch's own, which is then resized. It becomes an attribute of the storage's object,
    which torch keeps as long as the storage.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [ref(tensor) for tensor in tensors]
        self._storage: torch.UntypedStorage | None = None

    def __call__(self, nbytes: int) -> torch.UntypedStorage:
        if self._storage is None:
            self._storage = self._leave()
        resized: torch.UntypedStorage = self._storage.resize_(nbytes)
        return resized

    def _leave(self) -> torch.UntypedStorage:
        alive = [tensor for tensor in (reference() for reference in self._tensors) if tensor is not None]
        group = [tensor for tensor in alive if _resizing(tensor.untyped_storage()) is self]
        if not group:
            raise RuntimeError("A storage in shared memory cannot be resized when no weight uses it any more.")
        old = group[0].untyped_storage()
        if old.is_shared() or not _is_held_by(group, old):
            raise RuntimeError(
                "A storage that weight-transfer has moved into shared memory cannot be resized while anything beside "
                "the model's own tensors refers to it; let go of that, or set "
                'export = "stage" (ipc) or adopt = false (rdma).'
            )
        new = torch.UntypedStorage(old.nbytes())
        new.copy_(old)
        _point(group, new)
        for name in ("nbytes", "size", "data_ptr"):
            setattr(old, name, getattr(new, name))  # whoever kept the storage's object sees what it has become
        return new


def _resizing(storage: torch.UntypedStorage) -> object:
    return vars(storage).get(_RESIZE)


def _is_adopted(storage: torch.UntypedStorage) -> bool:
    return isinstance(_resizing(storage), _Resizing)
