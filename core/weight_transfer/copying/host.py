"""Copies between tensors in host memory, whatever else the processors have to do.

torch divides a copy of more than 32,768 elements among threads that wait for each other: where workers and a trainer
share cores, that takes ten times as long as one thread does. And each small copy costs it more than the bytes. So here
small ones are assignments between views of memory, made once and run at the speed of C; large ones are cut into blocks,
which a few threads take one after another without the interpreter's lock. Nobody waits for a thread that never ran.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Span = tuple[int, int, int]
    """Addresses of a target and of a source, and bytes."""

_LARGE = 256 * 2**10  # bytes from which on a copy is worth a call of its own, and threads
_BLOCK = 2**20  # bytes that a thread takes at a time
_THREADS = 8  # at most; memory has no more to give

_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pool.clear)


class HostCopies:
    """Copies that are made again and again, bit for bit or converted as ``target.copy_(source)`` does.

    Args:
        targets: in host memory, none over another one. Whoever runs the copies sees to it that neither these nor the
            sources have moved: those that need no conversion go by address.
        sources: of the same shapes, in host memory.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        spans, others = _divided(targets, sources)
        self._other_targets, self._other_sources = others
        spans = list(_merged(spans))
        small = [span for span in spans if span[2] < _LARGE]
        self._targets = [_memory(to, nbytes) for to, _, nbytes in small]
        self._sources = [_memory(frm, nbytes) for _, frm, nbytes in small]
        self._blocks = list(_blocks(span for span in spans if span[2] >= _LARGE))

    def run(self) -> None:
        """Make them. torch's mode must be one in which the targets may be written."""
        deque(map(memoryview.__setitem__, self._targets, repeat(slice(None)), self._sources), maxlen=0)
        _move(self._blocks)
        if self._other_targets:
            torch._foreach_copy_(self._other_targets, self._other_sources)


def copy_on_host(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Make copies once; see `HostCopies`."""
    large = [
        target.nbytes >= _LARGE and _is_plain(target, source) for target, source in zip(targets, sources, strict=True)
    ]
    pairs = list(zip(targets, sources, large, strict=True))
    others = [(target, source) for target, source, is_large in pairs if not is_large]
    if others:
        torch._foreach_copy_([target for target, _ in others], [source for _, source in others])
    _move(list(_blocks(_span(target, source) for target, source, is_large in pairs if is_large)))


def _divided(
    targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> tuple[list[Span], tuple[list[Tensor], list[Tensor]]]:
    """Return what goes by address, and the targets and sources of the rest."""
    spans: list[Span] = []
    others: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        if _is_plain(target, source):
            spans.append(_span(target, source))
        else:
            others[0].append(target)
            others[1].append(source)
    return spans, others


def _is_plain(target: Tensor, source: Tensor) -> bool:
    """Whether a copy is one of bytes from one place to another."""
    return (
        target.dtype is source.dtype
        and target.shape == source.shape
        and target.device.type == source.device.type == "cpu"
        and target.is_contiguous()
        and source.is_contiguous()
        and not (target.is_conj() or source.is_conj() or target.is_neg() or source.is_neg())
    )


def _span(target: Tensor, source: Tensor) -> Span:
    return target.data_ptr(), source.data_ptr(), target.nbytes


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """Put together those that continue each other on both sides."""
    last: Span | None = None
    for to, frm, nbytes in spans:
        if last is not None and last[0] + last[2] == to and last[1] + last[2] == frm:
            last = last[0], last[1], last[2] + nbytes
            continue
        if last is not None and last[2]:
            yield last
        last = to, frm, nbytes
    if last is not None and last[2]:
        yield last


def _blocks(spans: Iterable[Span]) -> Iterator[Span]:
    for to, frm, nbytes in spans:
        for start in range(0, nbytes, _BLOCK):
            yield to + start, frm + start, min(_BLOCK, nbytes - start)


def _memory(address: int, nbytes: int) -> memoryview:
    """Return memory by its address, without keeping it."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _move(blocks: Sequence[Span]) -> None:
    left = iter(blocks)

    def take() -> None:
        for to, frm, nbytes in left:
            ctypes.memmove(to, frm, nbytes)

    count = min(torch.get_num_threads(), _THREADS, len(blocks) // 2)
    helpers = [_threads().submit(take) for _ in range(count - 1)]
    take()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def _threads() -> ThreadPoolExecutor:
    if not _pool:
        _pool.append(ThreadPoolExecutor(_THREADS, thread_name_prefix="weight-transfer copies"))
    return _pool[0]
