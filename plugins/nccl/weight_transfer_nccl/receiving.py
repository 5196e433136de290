"""A worker's pipeline: while one batch is loaded, the next ones arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.authoring import HostCopies, Slot, bucket_views, destinations_of, torch_dtype, typed_view
from weight_transfer_nccl.buffers import WINDOW, Buffers
from weight_transfer_nccl.lanes import Lane
from weight_transfer_nccl.pieces import piece_of
from weight_transfer_nccl.views import Copies

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_nccl.group import Group
    from weight_transfer_nccl.plan import Batch, Plan
    from weight_transfer_nccl.works import Work

_WHAT = "receiving the weights"

Weights = list[tuple[str, torch.Tensor]]


@attrs.frozen
class _Landing:
    """Where a batch arrives.

    Attributes:
        data: uint8 tensors, one for each broadcast.
        bucket: number of the bucket that holds some of them; None: all arrive in the worker's own tensors.
        whole: the parameters that are complete once it has arrived, for a loader that does not just copy.
        copies: out of the bucket into the worker's own tensors, if it does.
        written: bytes of the worker's own tensors that are filled by these, or when it arrives; None if none can be.
        names: the weights that are whole in these then.
        parts: pieces of others, in the bucket.
        own: the weights in whose own tensors bytes arrive.
    """

    data: list[torch.Tensor]
    bucket: int | None
    whole: Weights
    copies: Copies | HostCopies
    written: int | None
    names: tuple[str, ...]
    parts: list[tuple[Slot, torch.Tensor]]
    own: tuple[str, ...]


class Receiving:
    """Receives plan after plan with the same buckets."""

    def __init__(self, device: torch.device, buffers: Buffers) -> None:
        self._device = device
        self._arriving = Lane(device)
        self._loading = Lane(device)
        self._plan: Plan | None = None
        self._destinations: Mapping[str, torch.Tensor] | None = None
        self._buffers = buffers
        self._short: list[_Landing] = []
        self._long: list[_Landing] | None = None
        self._loaded: dict[int, Any] = {}
        self._partial: dict[int, torch.Tensor] = {}

    @property
    def table_bytes(self) -> int:
        """Bytes of the GPU that tables of copies take."""
        copies = (landing.copies for landing in (*self._short, *(self._long or ())))
        return sum(each.table_bytes for each in copies if isinstance(each, Copies))

    def receive(
        self, group: Group, plan: Plan, load_weights: LoadWeights, deadline: Deadline, may_be_long: bool
    ) -> None:
        """Receive and load every parameter; returns when all are in place.

        Args:
            group: of the trainer and all workers.
            plan: of both sides.
            load_weights: the guard in front of the loader.
            deadline: until when.
            may_be_long: whether to take long launches if all weights arrive in their own storage: fewer, of which less
                can be done while they arrive.
        """
        destinations = destinations_of(load_weights)
        if self._plan is not plan or self._destinations is not destinations:
            self._prepare(plan, destinations)
        posted: deque[tuple[_Landing, Work]] = deque()
        self._partial = {}

        def load_next() -> None:
            self._load(*posted.popleft(), plan.manifest, load_weights)

        with group.guard(deadline):
            self._arriving.after_caller()
            self._loading.after_caller()
            with self._loading:
                with self._arriving.instead_of(self._loading):
                    group.begin(deadline, may_be_long and self._long is not None).wait()
                self._arriving.finish(deadline, _WHAT)  # until here no byte can have come
                landings = self._long if self._long is not None and may_be_long and group.agreed() else self._short
                for landing in landings:
                    while _is_full(posted, landing.bucket):
                        load_next()
                    if landing.own:
                        load_weights.write_in_place(landing.own)  # type: ignore[attr-defined]  # whoever has destinations has this
                    if landing.bucket is not None:
                        self._arriving.after(self._loaded.get(landing.bucket))
                    with self._arriving.instead_of(self._loading):
                        posted.append((landing, group.broadcast(landing.data, deadline)))
                while posted:
                    load_next()
            self._loading.finish(deadline, _WHAT)

    def _prepare(self, plan: Plan, destinations: Mapping[str, torch.Tensor] | None) -> None:
        """Decide where every batch arrives. Nothing may be under way."""
        self._plan, self._destinations = plan, destinations
        self._short, self._long = [], None
        in_place = all(tensor is not None for batch in plan.batches for tensor in self._owns(plan, batch))
        ways = (plan.batches, plan.long) if in_place else (plan.batches,)
        self._buffers.reserve(max((self._need(plan, batch) for batches in ways for batch in batches), default=0))
        self._short, *long = ([self._landing(plan, batch) for batch in batches] for batches in ways)
        self._long = long[0] if long else None

    def _owns(self, plan: Plan, batch: Batch) -> list[torch.Tensor | None]:
        return [self._own(plan.manifest.params[slot.param].name) for slot in batch.direct]

    def _need(self, plan: Plan, batch: Batch) -> int:
        """Return how many bytes of a bucket a batch needs."""
        if any(tensor is None for tensor in self._owns(plan, batch)):
            return batch.bucket_bytes
        return max(batch.packed_bytes, 1) if batch.packed else 0

    def _landing(self, plan: Plan, batch: Batch) -> _Landing:
        bucket, buffer = self._buffers.take() if self._need(plan, batch) else (None, torch.empty(0))
        return _land(plan.manifest, batch, self._owns(plan, batch), bucket, buffer, self._destinations)

    def _own(self, name: str) -> torch.Tensor | None:
        """Return the worker's own tensor if weights may arrive in it."""
        tensor = None if self._destinations is None else self._destinations.get(name)
        return tensor if tensor is not None and tensor.device == self._device and tensor.is_contiguous() else None

    def _load(self, landing: _Landing, work: Work, manifest: Manifest, load_weights: LoadWeights) -> None:
        work.wait()
        if landing.written is not None:
            load_weights.write_in_place(landing.names)  # type: ignore[attr-defined]
            landing.copies.run()
            load_weights.written(landing.written, landing.names)  # type: ignore[attr-defined]
        assembled = [done for slot, view in landing.parts for done in self._assemble(slot, view, manifest)]
        if landing.whole or assembled:
            load_weights(landing.whole + assembled)
        if landing.bucket is not None:
            self._loaded[landing.bucket] = self._loading.mark()

    def _assemble(self, slot: Slot, view: torch.Tensor, manifest: Manifest) -> Weights:
        """Add a piece to its tensor, a temporary one; return that once it is whole."""
        meta = manifest.params[slot.param]
        if not slot.start:
            self._partial[slot.param] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device=self._device)
        piece_of(self._partial[slot.param], slot).copy_(view)
        return [(meta.name, self._partial.pop(slot.param))] if slot.last else []


def _land(
    manifest: Manifest,
    batch: Batch,
    own: list[torch.Tensor | None],
    bucket: int | None,
    buffer: torch.Tensor,
    destinations: Mapping[str, torch.Tensor] | None,
) -> _Landing:
    data: list[torch.Tensor] = [buffer[: batch.packed_bytes]] if batch.packed_bytes else []
    whole: Weights = []
    parts: list[tuple[Slot, torch.Tensor]] = []
    written = 0
    names: list[str] = []
    for slot, view in zip(batch.packed, bucket_views(batch.packed, buffer), strict=True):
        meta = manifest.params[slot.param]
        whole.append((meta.name, typed_view(view, meta)))
    for slot, tensor in zip(batch.direct, own, strict=True):
        meta = manifest.params[slot.param]
        if tensor is not None:
            data.append(piece_of(tensor, slot))
            written += slot.nbytes
            names += [meta.name] if slot.last else []
            continue
        view = buffer[slot.offset : slot.offset + slot.nbytes]
        data.append(view)
        if slot.last and not slot.start:
            whole.append((meta.name, typed_view(view, meta)))
        else:
            parts.append((slot, view))
    arriving = tuple(
        manifest.params[slot.param].name for slot, tensor in zip(batch.direct, own, strict=True) if tensor is not None
    )
    if destinations is None:
        return _Landing(data, bucket, whole, Copies(()), None, (), parts, arriving)
    targets, sources = [destinations[name] for name, _ in whole], [view for _, view in whole]
    written += sum(target.nbytes for target in targets)
    names += [name for name, _ in whole]
    on_host = buffer.device.type == "cpu"
    copies = HostCopies(targets, sources) if on_host else Copies(list(zip(targets, sources, strict=True)))
    return _Landing(data, bucket, [], copies, written, tuple(names), parts, arriving)


def _is_full(posted: deque[tuple[_Landing, Work]], bucket: int | None) -> bool:
    """Whether the oldest batch has to be loaded before the next one may arrive: its bucket is needed."""
    return len(posted) == WINDOW or (bucket is not None and any(other.bucket == bucket for other, _ in posted))
