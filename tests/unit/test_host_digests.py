"""Digests that are taken while bytes are copied in host memory are those of what has been written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from weight_transfer.copying import host
from weight_transfer.copying.host import BLOCK, HostCopies
from weight_transfer.copying.threads import share_out
from weight_transfer.memory.chunks import CHUNK
from weight_transfer.memory.host_digests import HostDigests, HostReading
from weight_transfer.memory.integrity import Digester, tensor_digests

SIZES = [0, 1, 255, 0, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def digests_of_copies(copies: HostCopies) -> list[str]:
    count = len(copies.nbytes)
    digester = Digester(count)
    digester.copy(range(count), copies)
    return [f"{digest:016x}" for digest in digester.digests().tolist()]


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "adjacent"])
def test_copies_have_the_digests_of_what_they_write(apart: bool) -> None:
    sources = [random_bytes(nbytes, seed) for seed, nbytes in enumerate(SIZES)]
    flat = torch.zeros(sum(SIZES), dtype=torch.uint8)
    targets = [torch.zeros_like(source) for source in sources] if apart else list(flat.split(SIZES))
    copies, seen = HostCopies(targets, sources), []
    for flipped in (0, 1, 1):
        for source in sources:
            source[-1:] ^= flipped
        seen.append(digests_of_copies(copies))
        assert all(map(torch.equal, targets, sources))
        assert seen[-1] == tensor_digests(sources)
    assert seen[0] == seen[2]
    assert [a == b for a, b in zip(seen[0], seen[1], strict=True)] == [not nbytes for nbytes in SIZES]


def test_what_is_converted_or_scattered_has_the_digest_of_the_target() -> None:
    source, strided = torch.randn(600, 600), torch.zeros(600, 1200)[:, ::2]
    half, same = torch.zeros(600, 600, dtype=torch.bfloat16), torch.zeros(600, 600)
    found = digests_of_copies(HostCopies([half, same, strided], [source, source, source]))
    assert found == tensor_digests([source.bfloat16(), source, source])


Span = tuple[int, int, int]


def flipped(span: Span) -> None:
    ctypes.memmove(*span)
    ctypes.c_char.from_address(span[0] + span[2] - 1).value = b"\xff"


FAULTS: dict[str, Callable[[Span], object]] = {
    "dropped": lambda _span: None,
    "torn": lambda span: ctypes.memmove(span[0], span[1], span[2] // 2),
    "shifted": lambda span: ctypes.memmove(span[0] + 1, span[1], span[2] - 1),
    "zeroed": lambda span: ctypes.memset(span[0], 0, span[2]),
    "doubled": lambda span: ctypes.memmove(span[0], span[1] - BLOCK, span[2]),
    "flipped": flipped,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_that_is_not_written_as_meant_changes_the_digest(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    source = random_bytes(4 * BLOCK, 1)
    source[2 * BLOCK - 1] = source[3 * BLOCK - 1] = 0
    target = random_bytes(4 * BLOCK, 2)  # what was there before
    copies = HostCopies([target], [source])

    def move(span: Span) -> None:
        damage = span[0] == target.data_ptr() + 2 * BLOCK
        (FAULTS[fault] if damage else honest)(span)

    honest = host._move
    monkeypatch.setattr(host, "_move", move)
    assert digests_of_copies(copies) != tensor_digests([source])
    assert digests_of_copies(copies) == tensor_digests([target]), "it is the digest of what lies there"
    monkeypatch.undo()
    assert digests_of_copies(copies) == tensor_digests([source])


def test_a_small_copy_that_is_not_made_changes_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [random_bytes(2048, seed) for seed in range(1000)]  # several groups of them
    targets = [torch.zeros_like(source) for source in sources]
    copies = HostCopies(targets, sources)
    assert digests_of_copies(copies) == tensor_digests(sources)
    honest = host._Small.run

    def run(small: host._Small) -> None:
        honest(small)
        targets[700].zero_()

    monkeypatch.setattr(host._Small, "run", run)
    found, sent = digests_of_copies(copies), tensor_digests(sources)
    assert [number for number in range(1000) if found[number] != sent[number]] == [700]


def test_tensors_that_are_read_again_are_read_where_they_lie() -> None:
    """Of any form, and in another dtype than they have."""
    plain, large, strided = random_bytes(2048, 1), random_bytes(3 * CHUNK + 5, 2), torch.randn(64, 32).t()
    odd, empty, master = random_bytes(2049, 3)[1:], torch.zeros(0), torch.randn(300)
    tensors = [plain, large, strided, odd, empty, master]
    dtypes = [*(tensor.dtype for tensor in tensors[:-1]), torch.bfloat16]
    reading = HostReading(list(zip(tensors, dtypes, strict=True)))
    seen = []
    for _ in range(2):
        digests = [f"{digest:016x}" for digest in reading.digests().tolist()]
        assert digests == tensor_digests([*tensors[:-1], master.bfloat16()])
        seen.append(digests)
        for tensor in tensors:
            tensor.add_(1)
    assert [a == b for a, b in zip(*seen, strict=True)] == [False, False, False, False, True, False]
    for tensor in (plain, large):
        tensor.data = tensor + 1  # they lie elsewhere now
    assert [f"{digest:016x}" for digest in reading.digests().tolist()][:2] == tensor_digests([plain, large])


def test_whoever_reads_may_be_told_to_end() -> None:
    reading = HostReading([(torch.zeros(8), torch.float32), (torch.zeros(CHUNK), torch.float32)])
    told: list[int] = []

    def go_on() -> None:
        told.append(1)
        if len(told) == 2:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        reading.digests(go_on)


def test_two_blocks_that_change_places_change_the_digest() -> None:
    source, swapped = random_bytes(2 * CHUNK, 1), torch.empty(2 * CHUNK, dtype=torch.uint8)
    swapped[:CHUNK], swapped[CHUNK:] = source[CHUNK:], source[:CHUNK]
    assert tensor_digests([source]) != tensor_digests([swapped])


def test_blocks_may_come_in_any_order() -> None:
    data = random_bytes(3 * CHUNK + 7, 1)
    digests = HostDigests([data.nbytes])
    for start in (2 * CHUNK, 0, 3 * CHUNK, CHUNK):
        digests.take(0, start, memoryview(data[start : start + CHUNK].numpy()))
    assert f"{digests.digests()[0]:016x}" == tensor_digests([data])[0]


# Threads.


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_every_part_is_done_once(count: int) -> None:
    done: list[int] = []
    share_out(range(count), done.append)
    assert sorted(done) == list(range(count))


def test_after_an_error_no_further_part_is_begun() -> None:
    begun: list[int] = []

    def work(part: int) -> None:
        begun.append(part)
        raise ValueError(part)

    with pytest.raises(ValueError, match=r"^\d"):
        share_out(range(1000), work)
    assert len(begun) <= torch.get_num_threads()
