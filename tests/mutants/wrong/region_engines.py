"""Engines that are wrong about regions alone; the honest ones are those of the ``ipc`` backend."""

from __future__ import annotations

from typing import Any
from unittest import mock

import attrs
import numpy as np

from weight_transfer.authoring import IncomingRegions
from weight_transfer_ipc import host_region_reader
from weight_transfer_ipc.engine import IpcTrainerEngine, IpcWorkerEngine

_honest = host_region_reader.sources_of


class Altered(IncomingRegions):
    """Regions with other pieces, of which other bytes may be counted."""

    def __init__(self, incoming, pieces, counted=lambda nbytes: nbytes):
        self.layout, self.pieces, self.targets = incoming.layout, pieces, incoming.targets
        self._incoming, self._counted = incoming, counted

    def write_in_place(self):
        self._incoming.write_in_place()

    def moved(self, rank, nbytes):
        self._incoming.moved(rank, self._counted(nbytes))


class ReadsItsNeighbourWorker(IpcWorkerEngine):
    """Begins behind its own part of a shard, at the next worker's, if there is one."""

    def receive_regions(self, update_info, incoming):
        pieces, starts = incoming.pieces, incoming.pieces.source_start.copy()
        shards = {rank: incoming.layout.shards(rank) for rank in set(pieces.rank.tolist())}
        for row, (rank, shard) in enumerate(zip(pieces.rank.tolist(), pieces.shard.tolist(), strict=True)):
            _, region = shards[rank][shard]
            for dim, size in enumerate(region.shape):
                if starts[row, dim] + 2 * pieces.shape[row, dim] <= size:
                    starts[row, dim] += pieces.shape[row, dim]
        super().receive_regions(update_info, Altered(incoming, attrs.evolve(pieces, source_start=starts)))


class TakesAStaleReplicaTrainer(IpcTrainerEngine):
    """Gives shards that another rank has, too, as they were in the update before."""

    _stale: Any = None

    def share_regions(self, outgoing, deadline):
        if self._stale is None:
            self._given = [tensor.detach() for tensor in outgoing.tensors]
            copies = [
                tensor.clone() if self._is_replica(outgoing, *shard) else tensor
                for tensor, shard in zip(self._given, outgoing.layout.shards(outgoing.rank), strict=True)
            ]
            self._stale = attrs.evolve(outgoing, tensors=copies)
        return super().share_regions(self._stale, deadline)

    def send_regions(self, outgoing, deadline, progress):
        super().send_regions(self._stale, deadline, progress)

    def release_source(self):
        super().release_source()
        for stale, given in zip(self._stale.tensors, self._given, strict=True) if self._stale else ():
            stale.copy_(given)

    def _is_replica(self, outgoing, param, region):
        layout = outgoing.layout
        return any((param, region) in list(layout.shards(rank)) for rank in range(outgoing.rank))


class CopiesColumnsAsRowsWorker(IpcWorkerEngine):
    """Takes as many elements as a block of columns has, one after the other."""

    def receive_regions(self, update_info, incoming):
        def flat(pieces, shards):
            return [
                part.as_strided(part.shape, (part.shape[1], 1)) if part.dim() == 2 and part.stride(1) == 1 else part
                for part in _honest(pieces, shards)
            ]

        with mock.patch.object(host_region_reader, "sources_of", flat):
            super().receive_regions(update_info, incoming)


class MovesAPieceTwiceWorker(IpcWorkerEngine):
    """Copies its first piece again."""

    def receive_regions(self, update_info, incoming):
        twice = np.concatenate([[0], np.arange(len(incoming.pieces))])
        super().receive_regions(update_info, Altered(incoming, incoming.pieces.where(twice)))


class CountsWhatItSkipsWorker(IpcWorkerEngine):
    """Leaves its last piece, and counts it."""

    def receive_regions(self, update_info, incoming):
        pieces = incoming.pieces
        super().receive_regions(update_info, Altered(incoming, pieces.where(np.arange(len(pieces) - 1))))
        incoming.moved(int(pieces.rank[-1]), int(pieces.sizes[-1]))


class CountsDoubleWorker(IpcWorkerEngine):
    """Counts twice what it has moved."""

    def receive_regions(self, update_info, incoming):
        super().receive_regions(update_info, Altered(incoming, incoming.pieces, lambda nbytes: 2 * nbytes))


class KeepsItsShardsTrainer(IpcTrainerEngine):
    """Keeps a copy of all shards of each update."""

    def __init__(self, *args):
        super().__init__(*args)
        self._copies = []

    def send_regions(self, outgoing, deadline, progress):
        self._copies.append([tensor.clone() for tensor in outgoing.tensors])
        super().send_regions(outgoing, deadline, progress)
