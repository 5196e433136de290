"""Boxes of tensors as views: their bits go through a bucket unchanged, and nothing beside them is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import ManifestMismatchError, ParamMeta
from weight_transfer_nccl.views import Copies, Ends

CPU = torch.device("cpu")
dtypes = st.sampled_from(["uint8", "float8_e4m3fn", "bfloat16", "float32", "int64", "complex128"])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a tensor of any bits, NaNs of all kinds among them."""
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize
    for size in shape:
        count *= size
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@settings(deadline=None)
@given(
    dtypes, st.integers(1, 12), st.integers(1, 12), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()
)
def test_the_bits_of_a_box_go_through_a_bucket_and_nothing_else_is_written(
    dtype: str, rows: int, columns: int, top: int, left: int, turned: bool, target_turned: bool
) -> None:
    meta = ParamMeta("w", dtype, (rows + top, columns + left))
    own = getattr(torch, dtype)
    source = random_bits((rows + top, columns + left), own, 1)
    source = source.t().contiguous().t() if turned else source
    before = random_bits((rows + left, columns + top), own, 2)
    target = before.t().clone().t() if target_turned else before.clone()
    bucket = torch.zeros(256 * 1024, dtype=torch.uint8)
    for tensor, start, outgoing in ((source, [top, left], True), (target, [left, top], False)):
        ends = Ends([tensor], CPU, outgoing)
        view = ends.view(0, start, [rows, columns], meta)
        assert view.direct is tensor[start[0] :, start[1] :].is_contiguous()
        ends.copies(bucket, [(256, view)]).run()
    expected = before.clone()
    expected[left:, top:] = source[top:, left:]
    assert torch.equal(bits(target), bits(expected))


def test_a_shard_of_another_dtype_is_converted_into_the_bucket() -> None:
    shard = torch.randn(5, 6)[:, 1:4]
    ends = Ends([shard], CPU, outgoing=True)
    view = ends.view(0, [1, 0], [4, 3], ParamMeta("w", "bfloat16", (5, 3)))
    bucket = torch.zeros(64, dtype=torch.uint8)
    ends.copies(bucket, [(0, view)]).run()
    assert not view.direct
    assert torch.equal(bucket[: 4 * 3 * 2], bits(shard[1:].to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_a_target_of_another_dtype_is_refused(dtype: str) -> None:
    ends = Ends([torch.zeros(4, dtype=getattr(torch, dtype))], CPU, outgoing=False)
    with pytest.raises(ManifestMismatchError, match="A target of w"):
        ends.view(0, [0], [4], ParamMeta("w", "bfloat16", (4,)))


@pytest.mark.parametrize("start", [[0, 2], [3, 0]])
def test_a_tensor_that_does_not_hold_the_box_is_refused(start: list[int]) -> None:
    ends = Ends([torch.zeros(8, 8)[:4, :4]], CPU, outgoing=False)
    with pytest.raises(ManifestMismatchError, match=r"of shape \[4, 4\]"):
        ends.view(0, start, [2, 3], ParamMeta("w", "float32", (8, 8)))


@given(dtypes, st.sampled_from([(), (3,), (4, 6)]), st.booleans(), st.booleans())
def test_whole_tensors_are_copied_bit_by_bit(
    dtype: str, shape: tuple[int, ...], source_turned: bool, target_turned: bool
) -> None:
    own = getattr(torch, dtype)
    source, target = random_bits(shape, own, 1), random_bits(shape, own, 2)
    expected = source.clone()
    source = source.mT.contiguous().mT if source_turned and source.dim() == 2 else source
    target = target.mT.contiguous().mT if target_turned and target.dim() == 2 else target
    Copies([(target, source)]).run()
    assert torch.equal(bits(target), bits(expected))


def test_no_copies_are_falsy() -> None:
    assert not Copies([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [[2**20] * 20, [2**24 + 4, 7, 0, 2**24 + 1]], ids=["alike", "odd"])
def test_large_copies_within_a_gpu_bring_every_bit_also_after_memory_has_moved(sizes: list[int]) -> None:
    bucket = torch.zeros(sum(sizes) + 256 * len(sizes), dtype=torch.uint8, device="cuda")
    places = [sum(sizes[:number]) + 256 * number for number in range(len(sizes))]
    views = [bucket[place : place + size] for place, size in zip(places, sizes, strict=True)]
    tensors = [random_bits((size,), torch.uint8, seed).cuda() for seed, size in enumerate(sizes)]
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    into, out = (Copies(list(zip(*ends, strict=True))) for ends in ((views, tensors), (targets, views)))
    for seed in (1, 2, 1):
        for tensor in tensors:
            tensor.copy_(random_bits(tuple(tensor.shape), torch.uint8, seed))
        into.run()
        out.run()
        assert all(map(torch.equal, targets, tensors))
        before = bucket.data_ptr()
        bucket.untyped_storage().resize_(bucket.untyped_storage().nbytes() + 2**21)
        assert bucket.data_ptr() != before
    assert into.table_bytes > 0
    assert out.table_bytes > 0
