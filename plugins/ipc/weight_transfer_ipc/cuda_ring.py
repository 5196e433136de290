"""The ring of buckets in device memory: as in `ring`, but without waiting for the GPU between buckets.

Copies are queued on streams, and each side tells the other by a byte on the socket once its GPU has *done* them. So the
trainer packs the next bucket while a worker loads this one, and no stream ever waits for another process: a stream
that waits for an event of a process that was killed would never drain.
"""

from __future__ import annotations

import operator
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.authoring import Boxes, BucketPlan, Packer, Unpacker, destinations_of, has_kernel, plan_buckets
from weight_transfer_ipc import cuda
from weight_transfer_ipc.copies import OWN, PEER, Copies
from weight_transfer_ipc.cuda_export import layouts
from weight_transfer_ipc.device_memory import bytes_at
from weight_transfer_ipc.infos import Allocation
from weight_transfer_ipc.ring import RING, RingLayout, each

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_ipc.connection import Connection

POLL = 2e-5  # seconds between two looks at the GPU or the sockets


class CudaRingWriter:
    """The trainer's side.

    The memory does not come from torch's allocator, so that it can be exported whatever that is set to.

    Attributes:
        layout: size and number of the buckets.
        allocation: the exported memory.
    """

    def __init__(self, layout: RingLayout, device: torch.device) -> None:
        self.layout = layout
        self._device = device
        index = device.index
        try:
            address = cuda.allocate(layout.nbytes, index)
        except cuda.CudaMemoryError:
            torch.cuda.empty_cache()  # torch may hold free memory that the driver lacks
            address = cuda.allocate(layout.nbytes, index)
        self.allocation = Allocation(RING, cuda.uuid_of(index), layout.nbytes, cuda.export(address, index), address)
        self._buffers = layout.buffers(bytes_at(address, layout.nbytes, device))
        self._packer: Packer | None = None

    def write(
        self,
        plan: BucketPlan,
        tensors: Iterator[torch.Tensor],
        readers: Sequence[Connection],
        deadline: Deadline,
        progress: Callable[[int], None],
        kept: bool,
    ) -> None:
        """Send the tensors of ``plan``, in its order; returns when all readers have loaded all of them.

        Packing runs on the caller's current stream, where the tensors were gathered. ``kept``: they stay valid while
        somebody refers to them.
        """
        if self._packer is None or self._packer.plan is not plan:
            self._packer = Packer(plan, self._buffers)
        packing, count = self._packer.packing(tensors, kept), len(plan.buckets)
        desk = _Desk(readers, deadline)
        with torch.cuda.device(self._device):
            for index in range(count):
                desk.wait_until(lambda index=index: desk.loaded > index - len(self._buffers))  # type: ignore[misc]
                nbytes = next(packing)
                desk.packed(torch.cuda.current_stream().record_event())
                progress(nbytes)
            desk.wait_until(lambda: desk.loaded >= count)

    def close(self) -> None:
        """Give the memory back."""
        self._buffers, self._packer = [], None
        cuda.free(self.allocation.address, self._device.index)


class _Desk:
    """Where one update's signals go out and come in."""

    def __init__(self, readers: Sequence[Connection], deadline: Deadline) -> None:
        self._readers = list(readers)
        self._loaded = dict.fromkeys(self._readers, 0)
        self._deadline = deadline
        self._packing: deque[Any] = deque()

    @property
    def loaded(self) -> int:
        """How many buckets all readers have loaded."""
        return min((self._loaded[reader] for reader in self._readers), default=sys.maxsize)

    def packed(self, event: Any) -> None:
        """The next bucket will be full when ``event`` has happened; the readers are told then."""
        self._packing.append(event)
        self._attend()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Attend to the readers until ``condition`` holds. One that died is dropped; the last one raises."""
        self._attend()
        while not condition():
            self._deadline.check("waiting for workers to load a bucket", backend="ipc", phase="update")
            time.sleep(POLL)
            self._attend()

    def _attend(self) -> None:
        while self._packing and self._packing[0].query():
            self._packing.popleft()
            each(self._readers, lambda reader: reader.signal(self._deadline))
        each(self._readers, self._take)

    def _take(self, reader: Connection) -> None:
        self._loaded[reader] += reader.take_signals()


class CudaRingReader:
    """A worker's side.

    Args:
        layout: of the trainer's ring.
        memory: its bytes, uint8, on the worker's device.
        staged: what goes through it.
        peer: whether it lies on another GPU.
    """

    def __init__(self, layout: RingLayout, memory: torch.Tensor, staged: Manifest, peer: bool) -> None:
        self._plan = plan_buckets(staged.params, layout.bucket_bytes)
        self._buffers = layout.buffers(memory)
        self._unpacker = Unpacker(self._plan, self._buffers, shared=True)
        self._peer = peer
        self._in_place: InPlaceRing | None = None

    @property
    def extra_memory(self) -> int:
        """Bytes of device memory that it takes beside the ring."""
        return self._in_place.table_bytes if self._in_place is not None else 0

    def read(self, load_weights: LoadWeights, trainer: Connection, deadline: Deadline) -> None:
        """Load every bucket on the current stream."""
        unpacker = self._unpacker_for(load_weights)
        buckets = len(self._plan.buckets)
        read_buckets(buckets, lambda index: unpacker.load(index, load_weights), trainer, deadline)

    def _unpacker_for(self, load_weights: LoadWeights) -> Unpacker | InPlaceRing:
        destinations = destinations_of(load_weights)
        if destinations is None or not has_kernel():
            return self._unpacker
        tensors = [destinations[param.name] for param in self._plan.params]
        if not all(tensor.is_contiguous() and tensor.device == self._buffers[0].device for tensor in tensors):
            return self._unpacker
        if self._in_place is None or not self._in_place.writes(tensors):
            self._in_place = InPlaceRing(self._plan, self._buffers, tensors, self._peer)
        return self._in_place


def read_buckets(count: int, load: Callable[[int], None], trainer: Connection, deadline: Deadline) -> None:
    """Load each bucket on the current stream once it is full, and say so when the GPU has loaded it."""
    full, loading = 0, deque[Any]()
    for index in range(count):
        while full <= index:
            deadline.check("waiting for the trainer to fill a bucket", backend="ipc", phase="update")
            _tell(loading, trainer, deadline)
            arrived = trainer.take_signals()
            full += arrived
            if not arrived:
                time.sleep(POLL)
        load(index)
        loading.append(torch.cuda.current_stream().record_event())
    while loading:
        deadline.check("loading the last buckets", backend="ipc", phase="update")
        _tell(loading, trainer, deadline)
        trainer.check_alive()
        time.sleep(POLL)


def _tell(loading: deque[Any], trainer: Connection, deadline: Deadline) -> None:
    while loading and loading[0].query():
        loading.popleft()
        trainer.signal(deadline)


class InPlaceRing:
    """Copies buckets straight into the worker's own tensors, each with one or two launches; made once.

    Args:
        plan: of both sides.
        buffers: the ring's buckets.
        tensors: where the plan's parameters go, contiguous, on the worker's device.
        peer: whether the buckets lie on another GPU.
    """

    def __init__(
        self, plan: BucketPlan, buffers: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], peer: bool
    ) -> None:
        self._tensors = list(tensors)
        self._layout = layouts(self._tensors)
        self._copies: list[Copies] = []
        self._complete: list[list[tuple[str, torch.Tensor]]] = []
        for index, slots in enumerate(plan.buckets):
            base = buffers[index % len(buffers)].data_ptr()
            some = [slot for slot in slots if slot.nbytes]
            boxes = Boxes.contiguous(
                [base + slot.offset for slot in some],
                [tensors[slot.param].data_ptr() + slot.start for slot in some],
                [slot.nbytes for slot in some],
            )
            self._copies.append(Copies(boxes, buffers[0].device, PEER if peer else OWN))
            self._complete.append([(plan.params[s.param].name, tensors[s.param]) for s in slots if s.last])

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables of the copies take."""
        return sum(copies.nbytes for copies in self._copies)

    def writes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it was made for these tensors where they are now."""
        return all(map(operator.is_, tensors, self._tensors)) and layouts(self._tensors) == self._layout

    def load(self, index: int, load_weights: LoadWeights) -> None:
        """Copy a bucket on the current stream, and hand over the parameters that are complete then."""
        load_weights.write_in_place()  # type: ignore[attr-defined]  # whoever has destinations has this too
        self._copies[index].run(torch.cuda.current_stream())
        if self._complete[index]:
            load_weights(self._complete[index])
