"""Copies between tensors in host memory, whatever else the processors have to do.

torch divides a copy of more than 32,768 elements among threads that wait for each other: where workers and a trainer
share cores, that takes ten times as long as one thread does. And each small copy costs it more than the bytes. So here
small ones are assignments between views of memory, made once and run at the speed of C; large ones are cut into blocks,
which a few threads take one after another without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

import attrs
import torch

from weight_transfer.copying.threads import share_out

if TYPE_CHECKING:
    from torch import Tensor

    Span = tuple[int, int, int]
    """Addresses of a target and of a source, and bytes."""

BLOCK = 512 * 2**10
"""Bytes that a thread copies at a time; a processor's own cache holds them."""
LARGE = 128 * 2**10
"""Bytes from which on a copy is worth a call of its own, and threads."""

_VIEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITE = 0x200  # PyBUF_WRITE


class Notes(Protocol):
    """Is told of bytes that have been copied, and lie in the processor's cache by then."""

    def take(self, number: int, start: int, memory: memoryview) -> None:
        """Take a whole `BLOCK` of a target, or its rest; in any order, from any thread.

        Args:
            number: of the target.
            start: the place of the first byte.
            memory: the bytes.
        """

    def take_each(self, numbers: Sequence[int], memories: Sequence[memoryview]) -> None:
        """Take some targets of less than `LARGE` bytes, by number, and all bytes of each."""


class HostCopies:
    """Copies that are made again and again, bit for bit or converted as ``target.copy_(source)`` does.

    Args:
        targets: in host memory, none over another one. Whoever runs the copies sees to it that neither these nor the
            sources have moved: those that need no conversion go by address.
        sources: of the same shapes, in host memory.

    Attributes:
        nbytes: of each target.
        converted: the targets that do not go by address, by number.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        pairs = list(zip(targets, sources, strict=True))
        plain = [_is_plain(*pair) for pair in pairs]
        self.nbytes = [target.nbytes for target in targets]
        self.converted = {number: targets[number] for number, is_plain in enumerate(plain) if not is_plain}
        self._converted_from = [sources[number] for number in self.converted]
        spans = ((number, _span(*pairs[number])) for number, is_plain in enumerate(plain) if is_plain)
        self._spans = [(number, span) for number, span in spans if span[2]]
        merged = list(_merged(span for _, span in self._spans))
        small = [span for span in merged if span[2] < LARGE]
        self._small = _Small.of(small)
        self._blocks = list(_blocks(span for span in merged if span[2] >= LARGE))

    def run(self) -> None:
        """Make them. torch's mode must be one in which the targets may be written."""
        self._small.run()
        share_out(self._blocks, _move)
        self._convert()

    def run_noting(self, notes: Notes) -> None:
        """Make them, and tell of what goes by address: small targets some at a time, others block by block."""
        small, large = self._noted
        for numbers, copies in small:
            copies.run()
            notes.take_each(numbers, copies.targets)

        def move(block: _Noted) -> None:
            _move(block.span)
            notes.take(block.number, block.start, block.memory)

        share_out(large, move)
        self._convert()

    @cached_property
    def _noted(self) -> tuple[list[tuple[list[int], _Small]], list[_Noted]]:
        """The small targets, as many at a time as a processor's cache holds, and the blocks of the large ones."""
        small: list[tuple[list[int], list[Span]]] = []
        large: list[_Noted] = []
        room = 0
        for number, span in self._spans:
            to, _, nbytes = span
            if nbytes >= LARGE:
                blocks = _blocks([span])
                large += [_Noted(number, block[0] - to, block, memory_at(block[0], block[2])) for block in blocks]
                continue
            if nbytes > room or not small:
                small.append(([], []))
                room = BLOCK
            small[-1][0].append(number)
            small[-1][1].append(span)
            room -= nbytes
        return [(numbers, _Small.of(spans)) for numbers, spans in small], large

    def _convert(self) -> None:
        if self.converted:
            torch._foreach_copy_(list(self.converted.values()), self._converted_from)


@attrs.frozen(eq=False)
class _Small:
    """Copies that are assignments between views of memory."""

    targets: list[memoryview]
    sources: list[memoryview]

    @classmethod
    def of(cls, spans: Sequence[Span]) -> _Small:
        return cls(
            [memory_at(to, nbytes) for to, _, nbytes in spans], [memory_at(frm, nbytes) for _, frm, nbytes in spans]
        )

    def run(self) -> None:
        deque(map(memoryview.__setitem__, self.targets, repeat(slice(None)), self.sources), maxlen=0)


@attrs.frozen(eq=False)
class _Noted:
    """A block of a target of which somebody is told."""

    number: int
    start: int
    span: Span
    memory: memoryview


def copy_on_host(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Make copies once; see `HostCopies`."""
    large = [
        target.nbytes >= LARGE and _is_plain(target, source) for target, source in zip(targets, sources, strict=True)
    ]
    pairs = list(zip(targets, sources, large, strict=True))
    others = [(target, source) for target, source, is_large in pairs if not is_large]
    if others:
        torch._foreach_copy_([target for target, _ in others], [source for _, source in others])
    share_out(list(_blocks(_span(target, source) for target, source, is_large in pairs if is_large)), _move)


def memory_at(address: int, nbytes: int) -> memoryview:
    """Return memory by its address, without keeping it; ``numpy()`` would have a storage never be resized again."""
    memory: memoryview = _VIEW(address, nbytes, _WRITE) if nbytes else memoryview(b"")
    return memory


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
        for start in range(0, nbytes, BLOCK):
            yield to + start, frm + start, min(BLOCK, nbytes - start)


def _move(span: Span) -> None:
    ctypes.memmove(*span)
