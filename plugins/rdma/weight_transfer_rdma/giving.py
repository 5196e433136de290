"""What a trainer rank gives by region: where its shards lie, and buckets of what it packs for each worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from weight_transfer.authoring import ALIGNMENT, Manifest, ParamMeta, dtype_name, unstructure
from weight_transfer_rdma.copies import Copies, packed, parts
from weight_transfer_rdma.info import Share, ring_counter
from weight_transfer_rdma.nixl import DRAM, VRAM
from weight_transfer_rdma.packing import NOWHERE, Packing, Worth, can_be_read, pack, shard_shapes

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import OutgoingRegions, Pieces, Taker
    from weight_transfer_rdma.info import Endpoint
    from weight_transfer_rdma.memory import Arena, Located, Memory
    from weight_transfer_rdma.plan import Integers

WORTH = {DRAM: Worth(run=64 * 1024, piece=0), VRAM: Worth(run=2**20, piece=2**19)}
"""By kind of memory. A descriptor costs NIXL 4 microseconds between GPUs, in which 4 MB are packed or scattered, and 6
on the CPU (CMA), in which that is done with 64 KiB."""

MOST = {DRAM: 8 * 2**20, VRAM: 32 * 2**20}
"""Bytes of a bucket at most."""

BUCKETS = 8
"""Of each worker for which something is packed."""

_LEAST = 2**20  # bytes of a bucket, unless all rings together have less than that for 16 of them
_FEWEST = 2  # buckets, of many workers


def as_params(tensors: Sequence[torch.Tensor]) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Give tensors names and a manifest, for `Memory.locate`."""
    params = [ParamMeta(str(number), dtype_name(tensor.dtype), tensor.shape) for number, tensor in enumerate(tensors)]
    return Manifest(params), {str(number): tensor for number, tensor in enumerate(tensors)}


class Shards:
    """The shards of one `OutgoingRegions`, and what of them is packed for whom.

    Args:
        outgoing: what the rank gives.
        located: where its agent finds the shards.
        memory: in which they lie.
    """

    def __init__(self, outgoing: OutgoingRegions, located: Located, memory: Memory) -> None:
        self.outgoing, self.located = outgoing, located
        self._keep = memory.place.memory == VRAM
        self.worth = WORTH[memory.place.memory]
        params = outgoing.layout.manifest.params
        self._dtypes, self._dims = [param.dtype for param in params], [len(param.shape) for param in params]
        self.addresses = self._readable()
        self.packed = {taker.worker: pieces for taker in outgoing.takers if len(pieces := self._packed_for(taker))}

    def _readable(self) -> Integers:
        """Return the addresses of the shards that need no conversion."""
        addresses = self.located.addresses.copy()
        for number, (param, _) in enumerate(self.outgoing.layout.shards(self.outgoing.rank)):
            if dtype_name(self.outgoing.tensors[number].dtype) != self._dtypes[param]:
                addresses[number] = NOWHERE
        return addresses

    def _packed_for(self, taker: Taker) -> Pieces:
        pieces = taker.pieces
        shapes = shard_shapes(self.outgoing.layout, self.outgoing.rank, pieces.shape.shape[1])
        return pieces.where(np.flatnonzero(~can_be_read(pieces, self.addresses, shapes, self.worth)))

    def copies(self, packing: Packing, number: int, buffer: torch.Tensor) -> Copies:
        """Return the copies that fill a bucket."""
        chosen = packing.of_bucket(number)
        pieces, offsets = packing.pieces.where(chosen), packing.offset[chosen]
        tensors = self.outgoing.tensors
        params = pieces.param.tolist()
        dtypes, dims = [self._dtypes[param] for param in params], [self._dims[param] for param in params]

        def find() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            sources = parts(tensors, pieces.shard, pieces.source_start, pieces.shape)
            return packed(buffer, offsets, pieces, dtypes, dims), sources

        return Copies(find, self._keep)


def ring_sizes(packed: Mapping[int, Pieces], total: int, most: int) -> tuple[int, int]:
    """Return how many buckets each worker's ring has, and their size: mostly 1 MiB at least, unless less is enough.

    Args:
        packed: what is packed, by worker; at least one.
        total: bytes of all rings, unless there are too many workers for that.
        most: bytes of a bucket at most.
    """
    largest = max(int((-(-pieces.sizes // ALIGNMENT) * ALIGNMENT).sum()) for pieces in packed.values())
    share = total // len(packed)
    count = BUCKETS if share >= BUCKETS * _LEAST else _FEWEST
    least = max(min(_LEAST, total // 16), ALIGNMENT)
    nbytes = min(max(share // count, least) // ALIGNMENT * ALIGNMENT, most, largest)
    return min(count, -(-largest // nbytes)), nbytes


class Rings:
    """A ring of buckets for each worker for which something is packed.

    Args:
        shards: what is given.
        arena: in which the rings lie one after another; None if there are none.
        sizes: from `ring_sizes`.
        counters: the rank's.
    """

    def __init__(self, shards: Shards, arena: Arena | None, sizes: tuple[int, int], counters: Integers) -> None:
        self.shards, self.arena = shards, arena
        self._sizes, self._counters = sizes, counters
        self._rings: list[_Ring] = []
        self._described: tuple[Endpoint, int] | None = None
        self._share: dict[str, Any] = {}
        count, nbytes = sizes
        for worker, pieces in sorted(shards.packed.items()):
            assert arena is not None
            first = len(self._rings) * count * nbytes
            buffers = arena.data[first : first + count * nbytes].split(nbytes)
            packing = pack(pieces, nbytes)
            copies = [shards.copies(packing, number, buffers[number % count]) for number in range(packing.buckets)]
            moved = [int(packing.pieces.sizes[packing.of_bucket(number)].sum()) for number in range(packing.buckets)]
            peer = next(taker.peer for taker in shards.outgoing.takers if taker.worker == worker)
            self._rings.append(_Ring(peer, worker, arena.address + first, copies, moved))

    def share(self, endpoint: Endpoint, turn: int) -> dict[str, Any]:
        """Return what workers must know; the same object while it is unchanged."""
        if self._described is None or self._described[0] is not endpoint or self._described[1] != turn:
            located, (buckets, bucket_bytes) = self.shards.located, self._sizes
            addresses = {ring.worker: ring.address for ring in self._rings}
            workers = max((taker.worker for taker in self.shards.outgoing.takers), default=-1) + 1
            share = Share(
                endpoint=endpoint,
                addresses=tuple(self.shards.addresses.tolist()),
                region_addresses=tuple(located.regions.addresses.tolist()),
                region_sizes=tuple(located.regions.sizes.tolist()),
                worth=self.shards.worth,
                rings=tuple(addresses.get(worker, NOWHERE) for worker in range(workers)),
                buckets=buckets,
                bucket_bytes=bucket_bytes,
                turn=turn,
            )
            self._share, self._described = unstructure(share), (endpoint, turn)
        return self._share

    def fill(
        self,
        is_lost: Callable[[str], bool],
        settle_copies: Callable[[], None],
        pause: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        """Pack everything; returns when the workers that are left have read it.

        Args:
            is_lost: whether the worker behind a channel has failed; its pieces are left out then.
            settle_copies: waits until packed bytes are where they belong.
            pause: called when there is nothing to do; waits, and may raise.
            progress: called with the number of bytes that were packed.
        """
        begun = {ring.worker: int(self._counters[ring_counter(ring.worker)]) for ring in self._rings}
        filled = dict.fromkeys(begun, 0)
        while True:
            left = [ring for ring in self._rings if not is_lost(ring.peer)]
            read = {
                ring.worker: int(self._counters[ring_counter(ring.worker) + 1]) - begun[ring.worker] for ring in left
            }
            if all(read[ring.worker] >= len(ring.copies) for ring in left):
                return
            ready = [
                ring for ring in left if filled[ring.worker] < min(len(ring.copies), read[ring.worker] + self._sizes[0])
            ]
            for ring in ready:
                ring.copies[filled[ring.worker]].run()
            if ready:
                settle_copies()
            for ring in ready:
                filled[ring.worker] += 1
                self._counters[ring_counter(ring.worker)] = begun[ring.worker] + filled[ring.worker]
                progress(ring.moved[filled[ring.worker] - 1])
            if not ready:
                pause()

    def __len__(self) -> int:
        return len(self._rings)


@attrs.frozen(eq=False)
class _Ring:
    """What is packed for one worker: its address, and for each bucket the copies and their bytes."""

    peer: str
    worker: int
    address: int
    copies: list[Copies]
    moved: list[int]
