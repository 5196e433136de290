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
def xxh3_blocks(table, secret, start, out, rows, height: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    """Write the digests of the blocks that ``table`` lists.

    ``table`` is int64 ``[rows, 2]``: address, a multiple of 8, and bytes, over 240; ``secret`` the 192 bytes of the
    default secret, at steps of one byte as int64 ``[185]``, since it is read at odd places; ``start`` the accumulators'
    first values, int64 ``[8]``; ``out`` int64 ``[rows]``. A program takes ``height`` blocks, and a lane of each one of
    the eight accumulators.
    """
    row = tl.program_id(0) * height + tl.arange(0, height)
    real = row < rows
    base = tl.load(table + row.to(tl.int64) * 2, mask=real, other=0)
    size = tl.load(table + row.to(tl.int64) * 2 + 1, mask=real, other=0)
    lane = tl.arange(0, 8)
    words = base.to(tl.pointer_type(tl.int64))[:, None]
    acc = tl.zeros([height, 8], tl.int64) + tl.load(start + lane)[None, :]
    last_secret = tl.load(secret + 128 + lane * 8)[None, :]
    whole = tl.where(real, (size - 1) // 1024, 0)
    for block in range(0, tl.max(whole, 0)):
        inside = (block < whole)[:, None]
        before = acc
        plain = tl.zeros_like(acc)  # what goes to the neighbour
        for stripe in tl.static_range(16):
            value = tl.load(words + block * 128 + stripe * 8 + lane[None, :], mask=inside, other=0)
            keyed = value ^ tl.load(secret + stripe * 8 + lane * 8)[None, :]
            plain += value
            acc += (keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF)
        acc += _neighbours(plain, height)
        acc ^= (acc >> 47) & 0x1FFFF
        acc ^= last_secret
        acc *= _PRIME32_1
        acc = tl.where(inside, acc, before)
    stripes = tl.where(real, (size - 1 - whole * 1024) // 64, 0)
    plain = tl.zeros_like(acc)
    for stripe in range(0, tl.max(stripes, 0)):
        inside = (stripe < stripes)[:, None]
        at = words + (whole * 128)[:, None] + stripe * 8
        value = tl.load(at + lane[None, :], mask=inside, other=0)
        keyed = value ^ tl.load(secret + stripe * 8 + lane * 8)[None, :]
        plain += value
        acc += tl.where(inside, (keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF), 0)
    # the last 64 bytes, which may begin at any place
    value = _word_at((base + size - 64)[:, None] + lane[None, :] * 8, real[:, None])
    keyed = value ^ tl.load(secret + 121 + lane * 8)[None, :]
    acc += _neighbours(plain + value, height) + (keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF)
    # the accumulators, pair by pair
    keyed = acc ^ tl.load(secret + 11 + lane * 8)[None, :]
    left, right = tl.split(tl.reshape(keyed, [height, 4, 2]))
    high = tl.umulhi(left.to(tl.uint64, bitcast=True), right.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)
    total = size * _PRIME64_1 + tl.sum((left * right) ^ high, 1)
    total ^= (total >> 37) & 0x7FFFFFF
    total *= _AVALANCHE
    total ^= (total >> 32) & 0xFFFFFFFF
    tl.store(out + row, total, mask=real)


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
