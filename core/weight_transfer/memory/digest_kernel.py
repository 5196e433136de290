"""XXH3 (64 bits) of many blocks of bytes at once, in Triton, which torch's CUDA builds for Linux bring along.

The algorithm for more than 240 bytes, with the default secret and without a seed, as xxHash's specification has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PRIME32_1 = tl.constexpr(0x9E3779B1)
_PRIME64_1 = tl.constexpr(-0x61C8864E7A143579)  # 0x9E3779B185EBCA87 as a signed number
_AVALANCHE = tl.constexpr(0x165667919E3779F9)


@triton.jit  # type: ignore[untyped-decorator]
def xxh3_blocks(table, secret, start, out, rows, height: tl.constexpr, copies: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    """Write the digests of the blocks that ``table`` lists; programs share them, ``height`` at a time.

    ``table`` is int64 ``[rows, 3]``: address, a multiple of 8, bytes, over 240, and, if it also ``copies`` them, where
    to, bytes being a multiple of 8 then; ``secret`` the 192 bytes of the default secret, at steps of one byte as int64
    ``[185]``, since it is read at odd places; ``start`` the accumulators' first values, int64 ``[8]``; ``out`` int64
    ``[rows]``. Threads read side by side: the 16 stripes of 1 KiB at once, which only add up, and of each its 8 words.
    """
    lane = tl.arange(0, 8)
    stripe = tl.arange(0, 16)[None, :, None]
    word = stripe * 8 + lane[None, None, :]
    keys = tl.load(secret + word * 8 - stripe * 56)
    last_secret = tl.load(secret + 128 + lane * 8)[None, :]
    for number in range(tl.program_id(0), tl.cdiv(rows, height), tl.num_programs(0)):
        row = number * height + tl.arange(0, height)
        real = row < rows
        entry = table + row.to(tl.int64) * 3
        base = tl.load(entry, mask=real, other=0)
        size = tl.load(entry + 1, mask=real, other=0)
        words = base.to(tl.pointer_type(tl.int64))[:, None, None] + word
        target = tl.load(entry + 2, mask=real, other=0).to(tl.pointer_type(tl.int64))[:, None, None] + word
        acc = tl.zeros([height, 8], tl.int64) + tl.load(start + lane)[None, :]
        whole = tl.where(real, (size - 1) // 1024, 0)
        for block in range(0, tl.max(whole, 0)):
            inside = block < whole
            value = tl.load(words + block * 128, mask=inside[:, None, None], other=0)
            if copies:
                tl.store(target + block * 128, value, mask=inside[:, None, None])
            mixed = acc + _of_stripes(value, keys, height)
            mixed ^= (mixed >> 47) & 0x1FFFF
            mixed = (mixed ^ last_secret) * _PRIME32_1
            acc = tl.where(inside[:, None], mixed, acc)
        # the stripes that make no whole block, and what is left of a stripe
        left = tl.where(real, size - whole * 1024, 0)[:, None, None]
        in_stripe = stripe < (left - 1) // 64
        in_bytes = word * 8 + 8 <= left
        at = (whole * 128)[:, None, None]
        value = tl.load(words + at, mask=in_bytes, other=0)
        if copies:
            tl.store(target + at, value, mask=in_bytes)
        value = tl.where(in_stripe, value, 0)
        acc += _of_stripes(value, tl.where(in_stripe, keys, 0), height)
        # the last 64 bytes, which may begin at any place
        value = _word_at((base + size - 64)[:, None] + lane[None, :] * 8, real[:, None])
        keyed = value ^ tl.load(secret + 121 + lane * 8)[None, :]
        acc += _neighbours(value, height) + (keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF)
        # the accumulators, pair by pair
        keyed = acc ^ tl.load(secret + 11 + lane * 8)[None, :]
        even, odd = tl.split(tl.reshape(keyed, [height, 4, 2]))
        high = tl.umulhi(even.to(tl.uint64, bitcast=True), odd.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)
        total = size * _PRIME64_1 + tl.sum((even * odd) ^ high, 1)
        total ^= (total >> 37) & 0x7FFFFFF
        total *= _AVALANCHE
        total ^= (total >> 32) & 0xFFFFFFFF
        tl.store(out + row, total, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _of_stripes(value, keys, height: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    """Return what stripes, int64 ``[height, 16, 8]``, add to the accumulators."""
    keyed = value ^ keys
    products = tl.sum((keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF), 1)
    return products + _neighbours(tl.sum(value, 1), height)


@triton.jit  # type: ignore[untyped-decorator]
def _neighbours(values, height: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    """Exchange lanes 0 and 1, 2 and 3, and so on."""
    even, odd = tl.split(tl.reshape(values, [height, 4, 2]))
    return tl.reshape(tl.join(odd, even), [height, 8])


@triton.jit
def _word_at(address, real):  # type: ignore[no-untyped-def]  # Triton's own types
    """Read 8 bytes each from addresses that are no multiples of 8."""
    word = tl.zeros_like(address)
    for byte in tl.static_range(8):
        value = tl.load((address + byte).to(tl.pointer_type(tl.uint8)), mask=real, other=0)
        word |= value.to(tl.int64) << (8 * byte)
    return word
