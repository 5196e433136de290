"""How pieces are laid out in buckets, and which of them are worth a read of their own."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest

from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.model.regions import Region
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.plan.pieces import Pieces, plan_pieces
from weight_transfer_rdma.giving import ring_sizes
from weight_transfer_rdma.packing import Worth, pack, row_major, run_bytes, shard_shapes

SHAPES = [(700, 3), (5,), (), (4, 6, 50), (1, 9000), (2, 3, 4, 5)]


def _pieces(rng: np.random.Generator) -> Pieces:
    shapes = [SHAPES[number] for number in rng.integers(0, len(SHAPES), 12)]
    manifest = Manifest(ParamMeta(f"w{number}", "float32", shape) for number, shape in enumerate(shapes))
    whole = {param.name: [Region.whole(param.shape)] for param in manifest.params}
    return plan_pieces(Layout.of([Regions.of(manifest, whole)]), Regions.of(manifest, whole))


def test_every_element_lies_in_a_bucket_once_and_nothing_overlaps() -> None:
    rng = np.random.default_rng(3)
    for bucket_bytes in (256, 1024, 4096, 10**6 // 256 * 256):
        pieces = _pieces(rng)
        packing = pack(pieces, bucket_bytes)
        counts = [np.zeros(shape, dtype=int) for shape in pieces.shape.tolist()]
        taken = [np.zeros(bucket_bytes, dtype=int) for _ in range(packing.buckets)]
        cut = packing.pieces
        for number in range(len(cut)):
            box = tuple(slice(a, a + b) for a, b in zip(cut.source_start[number], cut.shape[number], strict=True))
            counts[int(cut.target[number])][box] += 1
            begin = int(packing.offset[number])
            assert begin % 256 == 0
            assert begin + cut.sizes[number] <= bucket_bytes
            taken[int(packing.bucket[number])][begin : begin + int(cut.sizes[number])] += 1
        assert all((count == 1).all() for count in counts)
        assert all((count <= 1).all() and count.any() for count in taken)
        assert (np.diff(packing.bucket) >= 0).all()
        for number in range(packing.buckets):
            assert packing.used(number) == int(np.flatnonzero(taken[number]).max()) + 1
        np.testing.assert_array_equal(cut.source_start, cut.target_start)


def test_no_pieces_need_no_bucket() -> None:
    pieces = _pieces(np.random.default_rng(0)).where(np.zeros(0, dtype=np.int64))
    assert pack(pieces, 4096).buckets == 0


@pytest.mark.parametrize(
    ("tensor", "piece", "run"),
    [
        ((4, 8), (4, 8), 32),
        ((4, 8), (2, 8), 16),
        ((4, 8), (4, 4), 4),
        ((4, 8), (1, 4), 4),
        ((4, 6, 8), (2, 6, 8), 96),
        ((4, 6, 8), (4, 3, 8), 24),
        ((9, 1), (5, 1), 5),
    ],
)
def test_runs_are_as_long_as_the_tensor_allows(tensor: tuple[int, ...], piece: tuple[int, ...], run: int) -> None:
    pieces = _pieces(np.random.default_rng(0)).where(np.array([0]))
    pieces = attrs.evolve(pieces, shape=np.array([piece]), itemsize=np.array([2]))
    assert run_bytes(pieces, np.array([tensor])).tolist() == [2 * run]
    assert run_bytes(pieces, np.array([tensor]), np.array([piece])).tolist() == [2 * run]
    single = run == int(np.prod(piece))
    assert Worth(run=2 * run + 1, piece=0).of(pieces, np.array([tensor])).tolist() == [single]
    assert Worth(run=2 * run, piece=10**9).of(pieces, np.array([tensor])).tolist() == [True]


def test_shapes_of_shards_are_those_of_the_layout() -> None:
    shapes = {"a": (7, 4), "whole": (3,), "b": (5,), "c": (2, 2, 2)}
    manifest = Manifest(ParamMeta(name, "float16", shape) for name, shape in shapes.items())
    held = [
        Regions.of(manifest, {name: [Region.split(shapes[name], 0, rank, 3)] for name in ("a", "b", "c")})
        for rank in range(3)
    ]
    layout = Layout.of(held)
    for rank in range(3):
        expected = [(*region.shape, 1, 1, 1)[:3] for _, region in layout.shards(rank)]
        assert list(map(tuple, shard_shapes(layout, rank, 3).tolist())) == expected


def test_strides_are_those_of_contiguous_tensors() -> None:
    for shape in itertools.product((1, 3, 4), repeat=3):
        assert row_major(np.array([shape])).tolist() == [[shape[1] * shape[2], shape[2], 1]]


@pytest.mark.parametrize(
    ("workers", "total", "expected"),
    [(1, 2**29, (5, 2**23)), (2, 2**24, (8, 2**20)), (16, 2**24, (2, 2**20)), (1, 2**21, (2, 2**20))],
)
def test_all_rings_together_stay_within_the_limit_while_each_can_have_two_mib(
    workers: int, total: int, expected: tuple[int, int]
) -> None:
    manifest = Manifest([ParamMeta("w", "uint8", (5, 2**23))])
    whole = Regions.of(manifest, {"w": [Region.whole((5, 2**23))]})
    pieces = plan_pieces(Layout.of([whole]), whole)
    count, nbytes = ring_sizes(dict.fromkeys(range(workers), pieces), total, 2**23)
    assert (count, nbytes) == expected
    assert workers * count * nbytes <= max(total, workers * 2**21)
