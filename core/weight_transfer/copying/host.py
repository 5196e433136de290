"""Copies between tensors in host memory, whatever else the processors have to do.

torch divides a copy of more than 32,768 elements among threads that wait for each other: where workers and a trainer
share cores, that takes ten times as long as one thread does. And each small copy costs it more than the bytes. So here
small ones are assignments between views of memory, made once and run at the speed of C; large ones are cut into blocks,
which a few threads take one after another without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING

import attrs
import torch

from weight_transfer.copying.threads import share_out

if TYPE_CHECKING:
    from torch import Tensor

    Span = tuple[int, int, int]
    """Addresses of a target and of a source, and bytes."""

    Note = Callable[[int, int, memoryview], object]
    """Takes the number of a target, and bytes of it that have been copied: the first one's place, and the memory."""

BLOCK = 512 * 2**10
"""Bytes that a thread copies at a time; a processor's own cache holds them."""
_LARGE = 256 * 2**10  # bytes from which on a copy is worth a call of its own, and threads

_VIEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITE = 0x200  # PyBUF_WRITE


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
        self._spans = [(number, _span(*pairs[number])) for number, is_plain in enumerate(plain) if is_plain]
        merged = list(_merged(span for _, span in self._spans))
        small = [span for span in merged if span[2] < _LARGE]
        self._targets = [memory_at(to, nbytes) for to, _, nbytes in small]
        self._sources = [memory_at(frm, nbytes) for _, frm, nbytes in small]
        self._blocks = list(_blocks(span for span in merged if span[2] >= _LARGE))

    def run(self) -> None:
        """Make them. torch's mode must be one in which the targets may be written."""
        deque(map(memoryview.__setitem__, self._targets, repeat(slice(None)), self._sources), maxlen=0)
        share_out(self._blocks, _move)
        self._convert()

    def run_noting(self, note: Note) -> None:
        """Make them, and tell of what goes by address, block by block: each is in the processor's cache by then.

        Args:
            note: called for each whole `BLOCK` of a target, and for its rest, in any order, by any thread.
        """
        small, large = self._noted

        def move(block: _Noted) -> None:
            _move(block.span)
            note(block.number, block.start, block.memory)

        for block in small:
            move(block)
        share_out(large, move)
        self._convert()

    @cached_property
    def _noted(self) -> tuple[list[_Noted], list[_Noted]]:
        """The small targets, and the blocks of the large ones."""
        blocks: tuple[list[_Noted], list[_Noted]] = [], []
        for number, whole in self._spans:
            for span in _blocks([whole]):
                block = _Noted(number, span[0] - whole[0], span, memory_at(span[0], span[2]))
                blocks[whole[2] >= _LARGE].append(block)
        return blocks

    def _convert(self) -> None:
        if self.converted:
            torch._foreach_copy_(list(self.converted.values()), self._converted_from)


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
        target.nbytes >= _LARGE and _is_plain(target, source) for target, source in zip(targets, sources, strict=True)
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
