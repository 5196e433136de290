"""What goes over a line, in whichever pieces it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer.control.line import Chunks, Messages, framed

PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(PIECES, st.lists(st.integers(0, 10**6), max_size=12), st.sampled_from([b"", b";a=b", b" ;c"]), st.booleans())
def test_a_body_is_what_its_chunks_hold_however_they_come(
    pieces: list[bytes], cuts: list[int], extension: bytes, ends: bool
) -> None:
    data = b"".join(b"%X%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    chunks = Chunks()
    found = [part for some in cut(data + (b"0\r\n\r\n" if ends else b""), cuts) for part in chunks.feed(some)]
    assert b"".join(found) == b"".join(pieces)
    assert chunks.ended is ends
    if ends:
        assert chunks.feed(b"5\r\nhello\r\n") == []


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"\r\n",
        b"-1\r\n",
        b"0x5\r\nhello\r\n",
        b"1_0\r\n",
        b"5\nhello\n",
        b"5\r\nhello!\r\n",
        b"5\r\nhello\n\n",
        b"10000000000000000\r\n",
        b"5" * 1025,
        b"5;" + b"x" * 1025,
    ],
)
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="chunk"):
        Chunks().feed(data)


@given(
    st.lists(st.binary(max_size=30).filter(lambda text: b"\n" not in text), min_size=1, max_size=5), st.integers(1, 7)
)
def test_messages_are_those_that_were_framed(messages: list[bytes], step: int) -> None:
    data, chunks, lines = b"".join(map(framed, messages)), Chunks(), Messages()
    found: list[bytes] = []
    for at in range(0, len(data), step):
        for part in chunks.feed(data[at : at + step]):
            found += lines.feed(part)
    assert found == messages
