"""Which bytes travel together: a plan that both sides derive from the manifest and the bucket size alone.

Parameters lie one after another, each aligned to 256 bytes, in buckets of a fixed size; one that is larger than what
is left of a bucket begins in it and spans the following ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.model.lending import private_copies
from weight_transfer.model.loading import destinations_of
from weight_transfer.model.manifest import ParamMeta, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from weight_transfer.engine import LoadWeights

ALIGNMENT = 256
"""Bytes; the alignment of CUDA allocations, so that every dtype and vectorised copy is at home."""


@attrs.frozen
class Slot:
    """A piece of one parameter in one bucket.

    Attributes:
        param: index of the parameter in the plan's list.
        start: first byte of the piece within the parameter.
        offset: first byte of the piece within the bucket.
        nbytes: length of the piece; 0 for an empty parameter.
        last: whether the parameter ends here.
    """

    param: int
    start: int
    offset: int
    nbytes: int
    last: bool


@attrs.frozen
class BucketPlan:
    """The buckets of one update, in order; each is a tuple of slots, sorted by offset."""

    params: tuple[ParamMeta, ...]
    bucket_bytes: int
    buckets: tuple[tuple[Slot, ...], ...]


def plan_buckets(params: Iterable[ParamMeta], bucket_bytes: int) -> BucketPlan:
    """Lay out ``params`` in buckets of ``bucket_bytes``; the same arguments give the same plan everywhere.

    Raises:
        ValueError: ``bucket_bytes`` is less than 256.
    """
    if bucket_bytes < ALIGNMENT:
        raise ValueError(f"a bucket needs at least {ALIGNMENT} bytes, got {bucket_bytes}")
    params = tuple(params)
    buckets: list[list[Slot]] = [[]]
    offset = 0
    for index, param in enumerate(params):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        start, nbytes = 0, param.nbytes
        while True:
            if offset >= bucket_bytes:
                buckets.append([])
                offset = 0
            piece = min(nbytes - start, bucket_bytes - offset)
            start += piece
            buckets[-1].append(Slot(index, start - piece, offset, piece, last=start == nbytes))
            offset += piece
            if start == nbytes:
                break
    return BucketPlan(params, bucket_bytes, tuple(map(tuple, buckets)) if params else ())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor as a uint8 tensor of shape ``[nbytes]`` that shares its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor whose bytes are its values: itself, unless it is strided or a conjugate view."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def bucket_views(slots: Sequence[Slot], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Return, for each slot, the bytes of ``buffer`` (uint8, ``[bucket_bytes]``) that it takes; cache them."""
    return [buffer[slot.offset : slot.offset + slot.nbytes] for slot in slots]


def typed_view(view: torch.Tensor, meta: ParamMeta) -> torch.Tensor:
    """Return a slot that holds a whole parameter as a tensor of its dtype and shape; it shares the bucket's memory."""
    dtype = torch_dtype(meta.dtype)
    if not view.numel():
        return torch.empty(meta.shape, dtype=dtype, device=view.device)
    return view.view(dtype).view(meta.shape)


def copy_converted(tensor: torch.Tensor, slot: Slot, dtype: torch.dtype, view: torch.Tensor) -> None:
    """Copy a piece of a contiguous tensor into its view of a bucket as ``dtype``; a slot must split no element.

    The same dtype is copied as bytes, since on CUDA a float's copy may change the bits of NaNs.
    """
    if tensor.dtype is dtype:
        view.copy_(as_bytes(tensor)[slot.start : slot.start + slot.nbytes])
        return
    first, count = slot.start // dtype.itemsize, slot.nbytes // dtype.itemsize
    view.view(dtype).copy_(tensor.detach().view(-1)[first : first + count])


class Packer:
    """Fills the buckets of a plan in order from a stream of tensors, with cached views.

    Args:
        plan: the plan of both sides.
        buffers: the uint8 buffers to fill; bucket ``i`` goes into ``buffers[i % len(buffers)]``.
    """

    def __init__(self, plan: BucketPlan, buffers: Sequence[torch.Tensor]) -> None:
        self.plan = plan
        self._views = [bucket_views(slots, buffers[i % len(buffers)]) for i, slots in enumerate(plan.buckets)]

    def packing(self, tensors: Iterator[torch.Tensor], kept: bool = False) -> Iterator[int]:
        """Fill the next bucket at each step, and yield how many bytes of weights it holds.

        Args:
            tensors: yields the plan's parameters in order, any shape. Each is copied before the next one is asked for;
                one of another dtype than the plan's is converted by the copy, with the bits of ``tensor.to``.
            kept: whether tensors stay as they are while somebody refers to them (``not source.reuses_memory``); then
                a bucket is filled by one batched copy, which is faster on a GPU.
        """
        tensor = torch.empty(0)
        for slots, views in zip(self.plan.buckets, self._views, strict=True):
            pieces = []
            for slot, view in zip(slots, views, strict=True):
                dtype = torch_dtype(self.plan.params[slot.param].dtype)
                if not slot.start:
                    tensor = self._packable(next(tensors), dtype)
                if tensor.dtype is not dtype:
                    copy_converted(tensor, slot, dtype, view)
                elif slot.nbytes:
                    piece = as_bytes(tensor)[slot.start : slot.start + slot.nbytes]
                    if kept:
                        pieces.append((view, piece))
                    else:
                        view.copy_(piece)
            if pieces:
                torch._foreach_copy_([view for view, _ in pieces], [piece for _, piece in pieces])
            yield sum(slot.nbytes for slot in slots)

    def _packable(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor contiguous, and converted already if buckets may split its elements."""
        splits = self.plan.bucket_bytes % dtype.itemsize
        return laid_out(tensor.to(dtype) if splits else tensor)


class Unpacker:
    """Loads buckets that arrive in order, with cached views and at most one temporary tensor.

    A parameter that spans buckets is assembled in the worker's own tensor if its loader only copies, else in a
    temporary tensor of its own size.

    Args:
        plan: the plan of both sides.
        buffers: the uint8 buffers that buckets arrive in; bucket ``i`` lies in ``buffers[i % len(buffers)]``.
        shared: whether others read the same memory, so that a loader which may write into its tensors gets copies.
    """

    def __init__(self, plan: BucketPlan, buffers: Sequence[torch.Tensor], shared: bool = False) -> None:
        self._plan = plan
        self._shared = shared
        self._device = buffers[0].device
        self._partial: torch.Tensor | None = None
        self._whole: list[list[tuple[str, torch.Tensor]]] = []
        self._pieces: list[list[tuple[Slot, torch.Tensor]]] = []
        for index, slots in enumerate(plan.buckets):
            whole, pieces = [], []
            for slot, view in zip(slots, bucket_views(slots, buffers[index % len(buffers)]), strict=True):
                meta = plan.params[slot.param]
                if slot.last and not slot.start:
                    whole.append((meta.name, typed_view(view, meta)))
                else:
                    pieces.append((slot, view))
            self._whole.append(whole)
            self._pieces.append(pieces)

    def load(self, index: int, load_weights: LoadWeights) -> None:
        """Hand to ``load_weights`` the parameters that are complete now that bucket ``index`` has arrived.

        When it returns, the bucket may be filled again.
        """
        complete = list(self._whole[index])
        if self._shared and destinations_of(load_weights) is None:
            complete = private_copies(complete)
        for slot, view in self._pieces[index]:
            if not slot.start:
                self._partial = self._target(slot.param, load_weights)
            assert self._partial is not None
            as_bytes(self._partial)[slot.start : slot.start + slot.nbytes].copy_(view)
            if slot.last:
                complete.append((self._plan.params[slot.param].name, self._partial))
                self._partial = None
        if complete:
            load_weights(complete)

    def _target(self, index: int, load_weights: LoadWeights) -> torch.Tensor:
        meta = self._plan.params[index]
        destination = (destinations_of(load_weights) or {}).get(meta.name)
        if destination is not None and destination.is_contiguous() and destination.device == self._device:
            load_weights.write_in_place()  # type: ignore[attr-defined]  # whoever has destinations has this too
            return destination
        return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device=self._device)
