"""What is planned for a GPU, and blocks of the ring: run on the CPU, where addresses are as good."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from support.region_case import Incoming, mixed
from weight_transfer.copying.table import ELEMENTS, joined, rows_of
from weight_transfer.model.manifest import torch_dtype
from weight_transfer.plan.views import sources_of, targets_of
from weight_transfer.values.deadline import Deadline
from weight_transfer_ipc import cuda_regions, piece_views
from weight_transfer_ipc.blocks import Blocks
from weight_transfer_ipc.cuda_regions import CudaRegions, Origin
from weight_transfer_ipc.region_plan import RankPlan
from weight_transfer_ipc.shares import shard_manifest
from weight_transfer_ipc.trainers import Trainers

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Boxes
    from weight_transfer.model.manifest import Manifest


class WalkedCopies:
    """Stands for `Copies`: does what the kernel does."""

    nbytes = 0

    def __init__(self, boxes: Boxes, _device: torch.device, side: Any) -> None:
        self._launches = rows_of(joined(boxes), side.tuning.piece)

    def run(self, _stream: object) -> None:
        for rows in self._launches:
            size = ELEMENTS[rows.unit]
            for source, target, run, count, source_step, target_step, _ in rows.table.tolist():
                for index in range(count):
                    far = index * size
                    ctypes.memmove(target + target_step * far, source + source_step * far, run * size)


class Stream:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, _other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_regions, "Copies", WalkedCopies)
    monkeypatch.setattr(cuda_regions, "has_kernel", lambda: True)
    monkeypatch.setattr(cuda_regions.cuda, "uuid_of", lambda _index: "0")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("part", [1, 1024])
@pytest.mark.parametrize(("ranks", "dim", "workers"), [(1, 0, 2), (2, 0, 2), (3, 0, 2), (2, 1, 4), (4, 1, 1)])
def test_the_copies_on_a_gpu_bring_every_region(
    monkeypatch: pytest.MonkeyPatch, part: int, ranks: int, dim: int, workers: int
) -> None:
    monkeypatch.setattr(cuda_regions, "_PART", part)
    case = mixed(ranks, workers, dim)
    shards = [case.shards(rank) for rank in range(ranks)]
    for worker in range(workers):
        incoming = Incoming(case, worker)
        origins = [
            Origin(_in_place(incoming, rank, shards[rank]), [str(rank)] * len(shards[rank]), "")
            for rank in range(ranks)
        ]
        regions = CudaRegions(origins, incoming.targets, torch.device("cpu"))
        for seed in (1, 2, 1):
            for rank in range(ranks):
                case.fill(shards[rank], rank, seed)
            assert regions.copy(incoming)
            regions.copy_others(incoming, Trainers(), Deadline(20))
            assert case.unlike(incoming.targets, worker, seed) == []


@pytest.mark.usefixtures("no_gpu")
def test_a_target_that_has_moved_is_noticed() -> None:
    case = mixed(2, 2)
    incoming = Incoming(case, 0)
    shards = case.shards(0)
    origins = [Origin(_in_place(incoming, 0, shards), ["0"] * len(shards), "")]
    regions = CudaRegions(origins, incoming.targets, torch.device("cpu"))
    assert regions.copy(incoming)
    incoming.targets = [target.clone() for target in incoming.targets]
    assert not regions.copy(incoming)


def _in_place(incoming: Incoming, rank: int, shards: list[torch.Tensor]) -> RankPlan:
    pieces = incoming.pieces.of_rank(rank)
    params = shard_manifest(incoming.layout, rank).params
    exact = np.array([torch_dtype(p.dtype) is s.dtype for p, s in zip(params, shards, strict=True)], dtype=np.bool_)
    return RankPlan(rank, pieces, exact[pieces.shard], list(shards), None, pieces, [])


@pytest.mark.parametrize("bucket_bytes", [256, 300, 1000, 1 << 20])
def test_blocks_fit_their_buckets_and_bring_every_piece(bucket_bytes: int) -> None:
    case = mixed(2, 2, dim=1)
    into = case.targets(1)
    for rank in range(2):
        manifest: Manifest = shard_manifest(case.layout, rank)
        shards = case.shards(rank)
        case.fill(shards, rank, 3)
        staged = [number for number, param in enumerate(manifest.params) if param.nbytes]
        blocks = Blocks.of(manifest, staged, bucket_bytes)
        for slots in blocks.plan.buckets:
            assert all(slot.offset % 256 == 0 and slot.offset + slot.nbytes <= bucket_bytes for slot in slots)
        sent = list(blocks.of_shards([shards[number] for number in staged], staged))
        assert [tensor.shape for tensor in sent] == [param.shape for param in blocks.plan.params]
        assert sum(param.nbytes for param in blocks.plan.params) == manifest.nbytes
        pieces = case.pieces(1).of_rank(rank)
        cut = blocks.cut(pieces)
        assert cut.nbytes == pieces.nbytes
        piece_views.copy(targets_of(cut, into), sources_of(cut, sent))
    assert case.unlike(into, 1, 3) == []
