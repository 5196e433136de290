"""Routes: every element of every piece travels once, in row-major order, and no batch is larger than its share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import Manifest, ParamMeta
from weight_transfer.authoring import Layout as RanksLayout
from weight_transfer.authoring import Pieces, Region, Regions
from weight_transfer.plan.pieces import plan_pieces
from weight_transfer_nccl.buffers import Buffers
from weight_transfer_nccl.plan import Layout
from weight_transfer_nccl.routes import Route, common_shards, plan_route, route_digest, split_shared

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
layouts = st.builds(
    Layout, bucket_bytes=st.integers(256, 3000), buckets=st.just(2), direct_bytes=st.sampled_from([1, 300, 5000])
)


def pieces_of(all_shapes: list[tuple[int, ...]], dtype: str, dim: int) -> Pieces:
    manifest = Manifest(tuple(ParamMeta(f"p{i}", dtype, shape) for i, shape in enumerate(all_shapes)))
    names = {param.name: param.shape for param in manifest.params}
    held = RanksLayout.of([Regions.of(manifest, {n: [Region.whole(s)] for n, s in names.items()})])
    kept = {n: [Region.split(s, min(dim, len(s) - 1), 1, 2)] for n, s in names.items()}
    return plan_pieces(held, Regions.of(manifest, kept))


def travelled(route: Route, piece: int) -> list[int]:
    """Return the elements of a piece in the order in which they travel."""
    shape = route.pieces.shape[piece]
    numbers = np.arange(int(shape.prod())).reshape(shape)
    found: list[int] = []
    for batch in route.batches:
        for slot in sorted((*batch.packed, *batch.direct), key=lambda slot: (slot.param, slot.start)):
            which, start, size = route.boxes.part(slot)
            if which == piece:
                box = numbers[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))]
                assert box.size * int(route.pieces.itemsize[piece]) == slot.nbytes
                found += box.reshape(-1).tolist()
    return found


@settings(deadline=None)
@given(st.lists(shapes, max_size=6), st.sampled_from(["uint8", "bfloat16", "complex128"]), layouts, st.integers(1, 5))
def test_every_element_travels_once_and_batches_are_bounded(
    all_shapes: list[tuple[int, ...]], dtype: str, layout: Layout, pairs: int
) -> None:
    pieces = pieces_of(all_shapes, dtype, 1)
    route = plan_route(3, pieces, layout, pairs)
    limit = max(layout.bucket_bytes // pairs // 256, 1) * 256
    assert all(0 < batch.bucket_bytes <= limit for batch in route.batches)
    assert sum(batch.nbytes for batch in route.batches) == pieces.nbytes
    for piece in range(len(pieces)):
        assert travelled(route, piece) == list(range(int(pieces.shape[piece].prod())))


def test_the_digest_tells_plans_apart() -> None:
    manifest = Manifest((ParamMeta("p0", "uint8", (8, 8)),))
    layout = Layout(1024, 2, 64)
    pieces = [pieces_of([(8, 8)], "uint8", dim) for dim in (0, 1)]
    digests = {route_digest(some, manifest, layout, pairs) for some in pieces for pairs in (1, 2)}
    assert len(digests) == 4
    assert route_digest(pieces[0], manifest, layout, 1) in digests


def test_shards_that_all_take_alike_are_common() -> None:
    rows, columns = (pieces_of([(8, 8), (6,)], "uint8", dim) for dim in (0, 1))
    assert common_shards([rows, columns]) == [1]
    assert common_shards([rows, rows]) == [0, 1]
    assert common_shards([rows]) == []
    common, own = split_shared(rows, {1})
    assert (common.shard.tolist(), own.shard.tolist()) == ([1], [0])


def test_views_of_buckets_stay_valid_when_the_buckets_grow() -> None:
    buffers = Buffers(2, torch.device("cpu"))
    buffers.reserve(10)
    number, bucket = buffers.take()
    view = bucket[4:8]
    buffers.reserve(10**6)
    view.fill_(7)
    assert buffers.nbytes == 2 * 10**6
    buffers.take()
    again, grown = buffers.take()
    assert (again, len(grown), grown[4:8].tolist()) == (number, 10**6, [7] * 4)
