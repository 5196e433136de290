"""The digest of a tensor notices every fault of a transfer."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer.memory.chunks import CHUNK
from weight_transfer.memory.gpu_copies import WeightCopies
from weight_transfer.memory.gpu_digests import Geometry, GpuReading
from weight_transfer.memory.integrity import Digester, tensor_digest, tensor_digests
from weight_transfer.plan.buckets import as_bytes

BYTES = st.binary(min_size=1, max_size=300)


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(BYTES, st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_changes_the_digest(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert tensor_digest(tensor_of(bytes(flipped))) != tensor_digest(tensor_of(data))


@pytest.mark.parametrize("word", [0, CHUNK // 8 - 1, CHUNK // 8, 2 * CHUNK // 8])
def test_any_flipped_bit_changes_the_digest_in_every_chunk(word: int) -> None:
    words = torch.zeros(2 * CHUNK // 8 + 1, dtype=torch.int64)
    digests = {tensor_digest(words)}
    for value in (1, 1 << 31, -(1 << 63)):
        words[word] = value
        digests.add(tensor_digest(words))
    assert len(digests) == 4


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=60), st.data())
@settings(max_examples=100, deadline=None)
def test_swapped_words_change_the_digest(words: list[int], draw: st.DataObject) -> None:
    left, right = draw.draw(st.integers(0, len(words) - 1)), draw.draw(st.integers(0, len(words) - 1))
    swapped = list(words)
    swapped[left], swapped[right] = swapped[right], swapped[left]
    before, after = torch.tensor(words, dtype=torch.int64), torch.tensor(swapped, dtype=torch.int64)
    assert (tensor_digest(before) == tensor_digest(after)) is (words == swapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_swapped_rows_and_a_transposition_change_the_digest(dtype: torch.dtype) -> None:
    rows = torch.arange(64 * 64).remainder(127).reshape(64, 64).to(dtype)
    assert tensor_digest(rows.flip(0)) != tensor_digest(rows)
    assert tensor_digest(rows.t()) != tensor_digest(rows)
    assert tensor_digest(torch.cat([rows[1:2], rows[:1], rows[2:]])) != tensor_digest(rows)


def test_chunks_of_equal_bytes_in_another_order_change_the_digest() -> None:
    first, second = torch.zeros(CHUNK, dtype=torch.uint8), torch.ones(CHUNK, dtype=torch.uint8)
    assert tensor_digest(torch.cat([first, second])) != tensor_digest(torch.cat([second, first]))


@pytest.mark.parametrize("bit", range(64))
def test_swapped_words_that_differ_in_one_bit_change_the_digest(bit: int) -> None:
    """Two weights whose signs alone differ, say: a product with a constant of the place does not tell them apart."""
    flip = 1 << bit if bit < 63 else -(1 << 63)
    whole = torch.zeros(256, dtype=torch.int64)
    digests = set()
    for position in range(256):
        whole[position] = flip
        digests.add(tensor_digest(whole))
        whole[position] = 0
    assert len(digests) == 256


@pytest.mark.parametrize("shift", [1, 8, 4096])
def test_shifted_bytes_change_the_digest(shift: int) -> None:
    data = torch.randint(0, 256, (20_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert tensor_digest(data.roll(shift)) != tensor_digest(data)


@given(st.integers(0, 200), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_zeros_at_the_end_count(nbytes: int, more: int) -> None:
    assert tensor_digest(torch.zeros(nbytes, dtype=torch.uint8)) != tensor_digest(
        torch.zeros(nbytes + more, dtype=torch.uint8)
    )


@given(BYTES, st.integers(0, 16), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_the_digest_does_not_depend_on_where_the_bytes_lie(data: bytes, base: int, offset: int) -> None:
    buffer = bytearray(base + offset) + bytearray(data)
    view = torch.frombuffer(buffer, dtype=torch.uint8, offset=base)[offset:]
    assert tensor_digest(view) == tensor_digest(tensor_of(data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.float64])
def test_the_same_bytes_have_the_same_digest_in_every_layout(dtype: torch.dtype) -> None:
    tensor = torch.arange(30 * 17).remainder(2).reshape(30, 17).to(dtype)
    expected = tensor_digest(tensor)
    assert tensor_digest(tensor.t().contiguous().t()) == expected
    assert tensor_digest(torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]) == expected
    assert tensor_digest(as_bytes(tensor)) == expected
    assert tensor_digest(tensor.reshape(-1)) == expected


def test_a_parameter_that_requires_grad_has_a_digest() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert tensor_digest(parameter) == tensor_digest(parameter.detach())


def test_the_digest_is_the_same_everywhere() -> None:
    assert tensor_digest(torch.arange(1000, dtype=torch.int64)) == "5dc6c010015c3a3b"
    assert tensor_digest(torch.arange(21, dtype=torch.uint8)) == "1845174c6e785e11"


def test_empty_tensors_have_a_digest_that_no_scalar_has() -> None:
    empty = tensor_digest(torch.empty(0))
    assert empty == tensor_digest(torch.empty(3, 0, dtype=torch.int8))
    assert empty != tensor_digest(torch.tensor(0, dtype=torch.int8))
    assert len(empty) == 16


def test_nan_payloads_and_signs_of_zero_count() -> None:
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tensor_digest(nans[:1]) != tensor_digest(nans[1:])


def test_digests_of_many_tensors_are_those_of_each() -> None:
    tensors = [torch.arange(size, dtype=torch.int32) for size in (0, 1, 7, 30_000, 5, 16_384, 16_385)]
    assert tensor_digests(tensors) == [tensor_digest(tensor) for tensor in tensors]
    assert len(set(tensor_digests(tensors))) == len(tensors)
    assert tensor_digests([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_a_gpu_has_the_same_digests(offset: int) -> None:
    sizes = [*range(20), *range(230, 260), *range(1000, 1100), CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17, 5 * CHUNK]
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(0, 256, (offset + n,), dtype=torch.uint8, generator=generator) for n in sizes]
    for tensors in (whole, whole[::-1]):
        on_gpu = [tensor.cuda()[offset:] for tensor in tensors]
        assert tensor_digests(on_gpu) == tensor_digests([tensor[offset:] for tensor in tensors])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_reads_beside_its_stream_may_be_written_after_it() -> None:
    tensors = [torch.randint(0, 256, (64 * 2**20 + size,), dtype=torch.uint8, device="cuda") for size in (0, 1, 300)]
    expected = tensor_digests([tensor.cpu() for tensor in tensors])
    for _ in range(3):
        kept = [tensor.clone() for tensor in tensors]
        digester = Digester(3)
        digester.add_beside(range(3), GpuReading(kept))
        digester.hold_up()
        for tensor in kept:
            tensor.zero_()
        assert [f"{digest:016x}" for digest in digester.digests().tolist()] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("together", [1, 2**31])
def test_what_is_gathered_is_read_once_it_is_there(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr("weight_transfer.memory.integrity._GATHERED", together)
    whole = torch.randint(0, 256, (3, 64 * 2**20), dtype=torch.uint8)
    expected, pinned, geometry = tensor_digests(list(whole)), whole.pin_memory(), Geometry()
    arriving = torch.cuda.Stream()
    for _ in range(3):
        tensors = torch.zeros_like(whole, device="cuda")
        arriving.wait_stream(torch.cuda.current_stream())
        digester = Digester(4, geometry)
        with torch.cuda.stream(arriving):
            for number in range(3):
                tensors[number].copy_(pinned[number], non_blocking=True)
                digester.gather([number], [tensors[number]])
        digester.gather([3], [whole[0]])
        assert [f"{digest:016x}" for digest in digester.digests().tolist()] == [*expected, expected[0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("source", "target"), [(0, 0), (16, 0), (0, 16), (8, 0), (1, 16), (0, 3)])
def test_a_gpu_copies_and_digests_at_once(source: int, target: int) -> None:
    sizes = [0, 1, 16, 240, 241, 256, 272, 1023, 1024, 1040, 2048, 5008, CHUNK - 16, CHUNK, CHUNK + 16, CHUNK + 256]
    sizes += [3 * CHUNK + 1040, 5 * CHUNK, 7 * CHUNK + 5]
    generator = torch.Generator().manual_seed(4)
    versions = [[torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes] for _ in "AB"]
    begins = list(accumulate((-(-n // 64) * 64 + 64 for n in sizes), initial=0))
    reads, writes = (torch.zeros(begins[-1] + 64, dtype=torch.uint8, device="cuda") for _ in range(2))
    sources = [reads[begin + source :][:n] for begin, n in zip(begins, sizes, strict=False)]
    targets = [writes[begin + target :][:n] for begin, n in zip(begins, sizes, strict=False)]
    copies = WeightCopies(targets, sources, lambda: pytest.fail("without digests"))
    for wanted in (versions[0], versions[1], versions[0]):
        for into, tensor in zip(sources, wanted, strict=True):
            into.copy_(tensor)
        writes.fill_(255)
        digester = Digester(len(sizes))
        digester.copy(range(len(sizes)), copies)
        assert [f"{digest:016x}" for digest in digester.digests().tolist()] == tensor_digests(wanted)
        untouched = writes.clone()
        for begin, tensor in zip(begins, wanted, strict=False):
            assert torch.equal(writes[begin + target :][: len(tensor)].cpu(), tensor)
            untouched[begin + target :][: len(tensor)] = 255
        assert (untouched == 255).all()
