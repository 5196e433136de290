"""The trainer's pipeline: while one batch is broadcast, the next one is packed."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.authoring import bucket_views, laid_out, uncast_tensors
from weight_transfer.errors import WeightsMovedError
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.pieces import Masters, StreamedBytes, piece_of
from weight_transfer_nccl.plan import Batch
from weight_transfer_nccl.views import Copies, addresses_of
from weight_transfer_nccl.works import Work

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, WeightSource
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Layout, Plan


@attrs.frozen
class _Packing:
    """Where the small tensors of a batch are packed.

    Attributes:
        bucket: number of the bucket.
        data: what is broadcast of it, uint8.
        views: the place of each tensor.
        direct: the place of each piece of a large tensor, if these are converted and so have one.
    """

    bucket: int
    data: torch.Tensor
    views: list[torch.Tensor]
    direct: list[torch.Tensor]


@attrs.frozen
class _Cut:
    """The bytes of a batch.

    Attributes:
        packed: of each small tensor that is not packed yet.
        direct: of each piece of a large one.
        temporary: whether they are copies, which take memory until they have left.
        copies: of the small tensors into their places, if they are made again and again.
    """

    packed: list[torch.Tensor]
    direct: list[torch.Tensor]
    temporary: bool
    copies: Copies | None = None


class _ResidentCut:
    """The bytes of a batch of tensors that stay where they are: looked up once."""

    def __init__(
        self, batch: Batch, tensors: list[torch.Tensor], views: list[torch.Tensor], device: torch.device
    ) -> None:
        self._batch = batch
        self._tensors = [tensors[slot.param] for slot in (*batch.packed, *batch.direct)]
        self._views = views
        self._device = device
        self._cut: _Cut | None = None
        self._addresses: list[int] = []

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that tables of copies take."""
        return self._cut.copies.table_bytes if self._cut is not None and self._cut.copies is not None else 0

    def get(self) -> _Cut:
        """Return the bytes; of tensors that are not contiguous or lie elsewhere, copies.

        Raises:
            WeightsMovedError: they lay elsewhere when they were looked up.
        """
        if self._cut is not None:
            if addresses_of((*self._cut.packed, *self._cut.direct)) != self._addresses:
                raise WeightsMovedError("Weights were moved meanwhile.", backend="nccl", phase="update", peer="trainer")
            return self._cut
        slots = (*self._batch.packed, *self._batch.direct)
        tensors = [laid_out(tensor.to(self._device)) for tensor in self._tensors]
        pieces = [piece_of(tensor, slot) for tensor, slot in zip(tensors, slots, strict=True)]
        count = len(self._batch.packed)
        copied = any(map(operator.is_not, tensors, self._tensors))
        if copied:
            return _Cut(pieces[:count], pieces[count:], temporary=True)
        copies = Copies(list(zip(self._views, pieces[:count], strict=True)))
        self._cut = cut = _Cut(pieces[:count], pieces[count:], temporary=False, copies=copies)
        self._addresses = addresses_of(pieces)
        return cut


@attrs.frozen
class _Running:
    """A batch under way, the bytes that it still needs, and its bucket (None: it needs none)."""

    work: Work
    cut: _Cut
    bucket: int | None


@attrs.define(eq=False)
class _Way:
    """One of the ways in which a plan's weights may travel.

    Attributes:
        batches: the plan's.
        packings: of each batch; None where nothing is packed.
        cuts: of each batch, if all tensors of the source stay where they are.
    """

    batches: Sequence[Batch]
    packings: list[_Packing | None]
    cuts: list[_ResidentCut] = attrs.field(factory=list)


class Sending:
    """Broadcasts plan after plan with the same buckets."""

    def __init__(self, layout: Layout, device: torch.device, buffers: Buffers) -> None:
        self._layout = layout
        self._device = device
        self._lane = Lane(device)
        self._plan: Plan | None = None
        self._converts = False
        self._buffers = buffers
        self._short = self._long = _Way((), [])
        self._resident: Mapping[str, torch.Tensor] | None = None
        self._in_place = False

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that tables of copies take."""
        return sum(cut.table_bytes for way in (self._short, self._long) for cut in way.cuts)

    def send(
        self,
        group: Group,
        plan: Plan,
        source: WeightSource,
        deadline: Deadline,
        progress: Callable[[int], None],
        may_be_long: bool,
    ) -> None:
        """Broadcast every byte of ``source``; returns when all of them have left.

        Args:
            group: of this rank and all workers.
            plan: of both sides.
            source: the weights.
            deadline: until when.
            progress: is told of bytes.
            may_be_long: whether launches may be long; see `Receiving.receive`.
        """
        masters = uncast_tensors(source, plan.manifest.params)
        converts = masters is not None
        if self._plan is not plan or self._converts is not converts:
            self._prepare(plan, converts)
        running: deque[_Running] = deque()
        with group.guard(deadline):
            self._lane.after_caller()
            with self._lane:
                streamed = Masters(masters) if masters is not None else self._look_up(plan, source)
                in_place = may_be_long and streamed is None and self._in_place
                way = self._long if in_place else self._short
                cut = self._pack(way, 0, streamed)  # a source that fails here costs the workers nothing
                group.begin(deadline, in_place).wait()
                if in_place and not self._agreed(group, deadline):
                    way = self._short
                    cut = self._pack(way, 0, streamed)
                for index, (batch, packing) in enumerate(zip(way.batches, way.packings, strict=True)):
                    bucket = packing.bucket if packing is not None else None
                    if index:
                        while self._is_full(running, bucket):
                            running.popleft().work.wait()
                        cut = self._pack(way, index, streamed)
                    packed = [packing.data] if packing is not None and batch.packed_bytes else []
                    running.append(_Running(group.broadcast([*packed, *cut.direct], deadline), cut, bucket))
                    progress(batch.nbytes)
                while running:
                    running.popleft().work.wait()
            self._lane.finish(deadline, "broadcasting the weights")

    def _agreed(self, group: Group, deadline: Deadline) -> bool:
        self._lane.finish(deadline, "waiting for the workers to begin")
        return group.agreed()

    def _pack(self, way: _Way, index: int, streamed: Masters | StreamedBytes | None) -> _Cut:
        """Put what is small of a batch into its bucket, and all of it if it is converted; return the batch's bytes."""
        batch, packing = way.batches[index], way.packings[index]
        if isinstance(streamed, Masters):
            assert packing is not None and self._plan is not None
            streamed.convert(batch, self._plan.manifest, [*packing.views, *packing.direct])
            return _Cut([], packing.direct, temporary=False)
        if streamed is None:
            cut = way.cuts[index].get()
        else:
            cut = _Cut(streamed.pieces(batch.packed), streamed.pieces(batch.direct), temporary=True)
        if cut.copies is not None:
            cut.copies.run()
        elif packing is not None:
            torch._foreach_copy_(packing.views, cut.packed)
        return cut

    def _is_full(self, running: deque[_Running], bucket: int | None) -> bool:
        """Whether the oldest batch has to leave before the next one: its bucket or its copies' memory is needed."""
        copies = sum(batch.cut.temporary for batch in running)
        return (
            len(running) == WINDOW
            or copies >= self._layout.buckets
            or (bucket is not None and any(batch.bucket == bucket for batch in running))
        )

    def _prepare(self, plan: Plan, converts: bool) -> None:
        """Reserve the buckets that the plan needs, and give each batch its own; all of it, if it is converted."""
        self._plan, self._resident, self._converts = plan, None, converts
        ways = (plan.batches,) if converts else (plan.batches, plan.long)
        used = [self._need(batch) for batches in ways for batch in batches if converts or batch.packed]
        self._buffers.reserve(max(used, default=0))
        self._short, self._long = (_Way(batches, list(map(self._packing, batches))) for batches in (ways[0], ways[-1]))

    def _need(self, batch: Batch) -> int:
        return max(batch.bucket_bytes if self._converts else batch.packed_bytes, 1)

    def _packing(self, batch: Batch) -> _Packing | None:
        if not (self._converts or batch.packed):
            return None
        bucket, buffer = self._buffers.take()
        data, views = buffer[: batch.packed_bytes], bucket_views(batch.packed, buffer)
        return _Packing(bucket, data, views, bucket_views(batch.direct, buffer) if self._converts else [])

    def _look_up(self, plan: Plan, source: WeightSource) -> StreamedBytes | None:
        """Find the source's tensors if all of them stay in place, else begin to iterate it."""
        resident = source.resident()
        if len(resident) != len(plan.manifest.params):
            return StreamedBytes(source, self._device)
        if self._resident is not resident:
            tensors = list(resident.values())
            for way in (self._short, self._long):
                way.cuts = [
                    _ResidentCut(batch, tensors, packing.views if packing is not None else [], self._device)
                    for batch, packing in zip(way.batches, way.packings, strict=True)
                ]
            self._in_place = all(map(self._travels_as_it_lies, tensors))
            self._resident = resident
        return None

    def _travels_as_it_lies(self, tensor: torch.Tensor) -> bool:
        here = tensor.device.type == self._device.type and self._device.index in (None, tensor.device.index)
        return here and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
