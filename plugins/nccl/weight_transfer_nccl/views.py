"""Boxes of tensors as views, and the copies between them and a bucket.

Bytes of one dtype are copied as integers, since on CUDA a float's copy may change the bits of NaNs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, NoReturn

import attrs
import torch

from weight_transfer.authoring import INTEGERS, Boxes, GpuCopies, Tuning, as_bytes, has_kernel, torch_dtype
from weight_transfer.errors import ManifestMismatchError

if TYPE_CHECKING:
    from weight_transfer.authoring import ParamMeta, Pieces

_WIDEST = 8  # bytes of an integer
_WORTH = 16 * 2**20  # bytes: fewer are copied before a kernel of our own would have begun
_BESIDE = Tuning(programs=32, tile=32 * 2**10, warps=8, piece=512 * 2**10)
"""Faster than bytes come, and of a large GPU only a quarter."""


class Copies:
    """Some copies, which run one after another on the current stream.

    On a GPU, a kernel that leaves most of it to NCCL makes those that are large and contiguous: torch's own, which take
    all of its memory's bandwidth for a moment, cost broadcasts a twentieth of their speed.

    Args:
        pairs: target and source, of one shape; if their dtypes differ, with the bits of ``tensor.to``.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        batches: dict[tuple[bool, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._conversions: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in pairs:
            target, source = pair
            if target.dtype is not source.dtype or source.is_conj() or source.is_neg():
                self._conversions.append(pair)
                continue
            dense = target.is_contiguous() and source.is_contiguous()
            ends = [as_bytes(end) if dense else _integers(end) for end in pair]
            wide = INTEGERS[min(map(_ratio, ends)) * ends[0].element_size()]
            batch = batches.setdefault((dense, wide), ([], []))  # dense ones of a dtype are copied by one launch
            for ends_of_batch, end in zip(batch, ends, strict=True):
                ends_of_batch.append(end.view(wide))
        self._batches = [
            _Kernel(*ends) if dense and _is_for_kernel(*ends) else _Foreach(*ends)
            for (dense, _), ends in batches.items()
        ]

    def __bool__(self) -> bool:
        return bool(self._batches or self._conversions)

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that the kernel's tables take, once they were needed."""
        return sum(batch.table_bytes for batch in self._batches)

    def run(self) -> None:
        """Copy everything."""
        for batch in self._batches:
            batch.run()
        for target, source in self._conversions:
            target.copy_(source)


@attrs.frozen
class _Foreach:
    """Copies by torch."""

    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    table_bytes: ClassVar[int] = 0

    def run(self) -> None:
        torch._foreach_copy_(self.targets, self.sources)


class _Kernel:
    """Copies of contiguous tensors within one GPU, by address; worked out anew when one of them lies elsewhere."""

    def __init__(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self._targets, self._sources = targets, sources
        self._addresses: tuple[list[int], list[int]] | None = None
        self.table_bytes = 0

    def run(self) -> None:
        addresses = addresses_of(self._sources), addresses_of(self._targets)
        if addresses != self._addresses:
            boxes = Boxes.contiguous(*addresses, [target.nbytes for target in self._targets])
            self._copies = GpuCopies(boxes, self._targets[0].device, _BESIDE)
            self._addresses, self.table_bytes = addresses, self._copies.nbytes
        self._copies.run()


def _is_for_kernel(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> bool:
    gpus = {end.device for end in (*targets, *sources)}
    if len(gpus) > 1 or not targets[0].is_cuda:
        return False
    return sum(target.nbytes for target in targets) >= _WORTH and has_kernel()


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return where the first element of each lies."""
    return list(map(torch.Tensor.data_ptr, tensors))


@attrs.frozen
class View:
    """A box of a tensor.

    Attributes:
        tensor: the box, as integers, or in its own dtype if it is converted; of one dimension if it is contiguous.
        travels: dtype of its bytes in a bucket.
        direct: whether they can travel from or into the tensor itself: as they lie there, they are those that travel.
    """

    tensor: torch.Tensor
    travels: torch.dtype
    direct: bool

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.tensor.numel() * self.travels.itemsize


class Ends:
    """The tensors of one side: a rank's shards, or a worker's targets.

    Args:
        tensors: as pieces count them.
        device: of the buckets.
        outgoing: whether they are shards.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device, outgoing: bool) -> None:
        self._tensors = tensors
        self._device = device
        self._outgoing = outgoing
        self._bits: dict[int, torch.Tensor | None] = {}

    def place(self, pieces: Pieces, piece: int) -> tuple[int, list[int]]:
        """Return in which tensor a piece lies, and where it begins there."""
        if self._outgoing:
            return int(pieces.shard[piece]), pieces.source_start[piece].tolist()
        return int(pieces.target[piece]), pieces.target_start[piece].tolist()

    def view(self, number: int, start: Sequence[int], shape: Sequence[int], meta: ParamMeta) -> View:
        """Return a box of a tensor, which is one of a parameter.

        Raises:
            ManifestMismatchError: the tensor does not hold the box, or is a target of another dtype.
        """
        dtype, tensor = torch_dtype(meta.dtype), self._tensors[number]
        if number not in self._bits:
            self._bits[number] = _as_integers(tensor.detach(), dtype)
        bits, dims = self._bits[number], tensor.dim()
        if any(a + b > size for a, b, size in zip_longest(start, shape, tensor.shape, fillvalue=1)):
            self._refuse(meta, f"of shape {list(tensor.shape)}, which does not hold what was planned")
        if bits is None and not self._outgoing:
            self._refuse(meta, f"of {tensor.dtype}")
        whole = tensor.detach() if bits is None else bits
        steps = whole.stride()
        offset = whole.storage_offset() + sum(a * b for a, b in zip(start, steps[:dims], strict=False))
        box = torch.as_strided(whole, [*shape[:dims], *whole.shape[dims:]], steps, offset)
        contiguous = box.is_contiguous()
        if contiguous:  # in one dimension: a dimension of size 1 may have any stride, which torch minds
            box = torch.as_strided(whole, [box.numel()], [1], offset)
        direct = bits is not None and contiguous and box.device == self._device
        return View(box, dtype if bits is None else box.dtype, direct)

    def copies(self, bucket: torch.Tensor, staged: Sequence[tuple[int, View]]) -> Copies:
        """Return the copies between a bucket and views; with each stands its offset in the bucket."""
        pairs = []
        for offset, view in staged:
            packed = bucket[offset : offset + view.nbytes].view(view.travels).view(view.tensor.shape)
            pairs.append((packed, view.tensor) if self._outgoing else (view.tensor, packed))
        return Copies(pairs)

    def _refuse(self, meta: ParamMeta, what: str) -> NoReturn:
        raise ManifestMismatchError(
            f"{'A shard' if self._outgoing else 'A target'} of {meta} is {what}; let every tensor keep its shape and "
            "dtype between updates.",
            backend="nccl",
            phase="update",
        )


def _as_integers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a tensor as integers of its size; None if its bytes are not those of ``dtype``."""
    return None if tensor.dtype is not dtype or tensor.is_conj() or tensor.is_neg() else _integers(tensor)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as integers of its size, two for complex128."""
    if tensor.itemsize > _WIDEST:
        tensor = torch.view_as_real(tensor)
    return tensor.view(INTEGERS[tensor.itemsize])


def _ratio(view: torch.Tensor) -> int:
    """Return how many neighbouring elements can be copied as one."""
    size = view.element_size()
    ratio = _WIDEST // size
    while ratio > 1:
        if (
            view.dim()
            and view.stride(-1) == 1
            and view.shape[-1] % ratio == 0
            and view.storage_offset() % ratio == 0
            and view.data_ptr() % (ratio * size) == 0
            and not any(step % ratio for step in view.stride()[:-1])
        ):
            return ratio
        ratio //= 2
    return 1
