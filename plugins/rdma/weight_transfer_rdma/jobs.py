"""What a worker reads of weights that go whole, one read after another: planned once, done again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.authoring import ALIGNMENT, Unpacker, plan_buckets
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_rdma.nixl import DRAM, VRAM
from weight_transfer_rdma.plan import Regions, cuts, merge
from weight_transfer_rdma.reading import Job

if TYPE_CHECKING:
    import torch

    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer.engine import LoadWeights
    from weight_transfer_rdma.info import Endpoint, Table
    from weight_transfer_rdma.memory import Located, RunningAgent
    from weight_transfer_rdma.nixl import Place

_CHUNK = {DRAM: 64 * 2**20, VRAM: 2**30}  # bytes of one read into the worker's own parameters


class Planner:
    """Turns a manifest and both sides' addresses into jobs."""

    def __init__(
        self,
        agent: RunningAgent,
        endpoint: Endpoint,
        place: Place,
        manifest: Manifest,
        table: Table,
        deadline: Deadline,
    ) -> None:
        self._agent, self._endpoint, self._place, self._deadline = agent, endpoint, place, deadline
        self._table = table
        self._params = manifest.params
        self._remote = np.array(table.addresses, dtype=np.int64)
        self._sizes = np.array([param.nbytes for param in manifest.params], dtype=np.int64)
        if len(self._remote) != len(self._sizes) or len(table.region_addresses) != len(table.region_sizes):
            raise ManifestMismatchError(
                "The trainer's table of addresses and its manifest differ in length.", backend="rdma"
            )
        regions = Regions.of(list(zip(table.region_addresses, table.region_sizes, strict=True)))
        reachable = (self._remote >= 0) & (self._sizes > 0)
        self._regions = np.full(len(self._sizes), -1, dtype=np.int64)
        self._regions[reachable] = regions.index(self._remote[reachable], self._sizes[reachable])
        self.left = set(range(len(self._sizes)))

    def direct(self, located: Located | None) -> list[Job]:
        """Read into the worker's own parameters what both agents reach."""
        if located is None:
            return []
        at_home = np.zeros(len(self._sizes), dtype=np.int64)
        possible = (self._remote >= 0) & (located.addresses >= 0) & (self._sizes > 0)
        at_home[possible] = located.regions.index(located.addresses[possible], self._sizes[possible])
        order = np.flatnonzero(possible)  # as the manifest has them, in which order the core looks at the worker's own
        jobs = []
        for some in np.split(order, cuts(self._sizes[order], _CHUNK[self._place.memory])):
            chunk = some[np.argsort(located.addresses[some], kind="stable")]
            if len(chunk):
                rows = merge(
                    located.addresses[chunk],
                    self._remote[chunk],
                    self._sizes[chunk],
                    at_home[chunk],
                    self._regions[chunk],
                    located.padding[chunk],
                )
                nbytes = int(self._sizes[chunk].sum())
                names = tuple(self._params[index].name for index in chunk.tolist())
                jobs.append(Job(self._prepare(rows), 0, nbytes, _telling(nbytes, names), claim=_claiming(names)))
        if not self._sizes.all():
            jobs.append(Job(None, 0, 0, _telling(0, [])))  # there is nothing to read of what is empty
        self.left -= {*order.tolist(), *np.flatnonzero(self._sizes == 0).tolist()}
        return jobs

    def staged(self, buffers: list[torch.Tensor], address: int) -> list[Job]:
        """Read the rest into staging buckets.

        Args:
            buffers: the buckets, uint8, one after another.
            address: of the first one in the agent.
        """
        stride = buffers[0].nbytes
        addresses = [address + index * stride for index in range(len(buffers))]
        pulled = self._pulled(buffers, addresses)
        turn = len(pulled) % len(buffers)  # the next bucket is read while the last one of these is loaded
        return pulled + self._filled(buffers[turn:] + buffers[:turn], addresses[turn:] + addresses[:turn])

    def _pulled(self, buffers: list[torch.Tensor], addresses: list[int]) -> list[Job]:
        """Read from the trainer's own parameters what its agent reaches."""
        indices = [index for index in sorted(self.left) if self._remote[index] >= 0 or not self._sizes[index]]
        plan = plan_buckets([self._params[index] for index in indices], self._table.bucket_bytes)
        unpacker = Unpacker(plan, buffers)
        jobs = []
        for number, slots in enumerate(plan.buckets):
            used = [slot for slot in slots if slot.nbytes]
            handle = None
            if used:
                params = np.array([indices[slot.param] for slot in used], dtype=np.int64)
                rows = merge(
                    addresses[number % len(buffers)] + np.array([slot.offset for slot in used], dtype=np.int64),
                    self._remote[params] + np.array([slot.start for slot in used], dtype=np.int64),
                    np.array([slot.nbytes for slot in used], dtype=np.int64),
                    np.zeros(len(used), dtype=np.int64),
                    self._regions[params],
                    np.full(len(used), ALIGNMENT, dtype=np.int64),
                )
                handle = self._prepare(rows)
            nbytes = sum(slot.nbytes for slot in used)
            jobs.append(Job(handle, 0, nbytes, _unpacking(unpacker, number), buffered=handle is not None))
        self.left -= set(indices)
        return jobs

    def _filled(self, buffers: list[torch.Tensor], addresses: list[int]) -> list[Job]:
        """Read the buckets that the trainer fills, one after another."""
        plan = plan_buckets([self._params[index] for index in sorted(self.left)], self._table.bucket_bytes)
        if plan.params and not self._table.buckets:
            raise ManifestMismatchError("The trainer's table has weights without an address.", backend="rdma")
        unpacker = Unpacker(plan, buffers)
        jobs = []
        for number, slots in enumerate(plan.buckets):
            theirs = self._table.buckets[number % len(self._table.buckets)]
            row = np.array([[addresses[number % len(buffers)], theirs, slots[-1].offset + slots[-1].nbytes]], np.uint64)
            jobs.append(Job(self._prepare(row), number + 1, 0, _unpacking(unpacker, number), buffered=True))
        self.left.clear()
        return jobs

    def _prepare(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> int:
        endpoint = self._endpoint
        return self._agent.prepare("READ", endpoint.agent, rows, self._place, endpoint.place, self._deadline)


def _claiming(names: tuple[str, ...]) -> Callable[[LoadWeights], None]:
    return lambda load_weights: load_weights.write_in_place(names)  # type: ignore[attr-defined]  # it has destinations


def _telling(nbytes: int, names: Sequence[str]) -> Callable[[LoadWeights], None]:
    return lambda load_weights: load_weights.written(nbytes, names)  # type: ignore[attr-defined]  # it has destinations


def _unpacking(unpacker: Unpacker, number: int) -> Callable[[LoadWeights], None]:
    return lambda load_weights: unpacker.load(number, load_weights)
