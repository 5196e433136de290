"""Thousands of copies between addresses as one or two launches: a table that is made once, and what walks it.

On one GPU a kernel copies everything. From a peer GPU the copy engines are faster than a kernel for large pieces, and
slower for small ones, since each copy costs them about a microsecond.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache

import attrs
import torch

from weight_transfer_ipc import cuda

logger = logging.getLogger(__name__)

_WIDE = 16  # bytes that a thread moves at a time where addresses allow it
_PIECE = 128 * 2**10  # bytes per row: few rows make a small table, many keep reads and writes close together
_TILE = {_WIDE: 8192, 1: 4096}  # elements (of 4 bytes or 1 byte) that one program has under way
_ENGINE_BYTES = 8 * 2**20  # from here on a copy from a peer is left to the copy engines


@attrs.frozen
class Spans:
    """Copies as columns of a tensor, int64 ``[spans]`` each, on the CPU: addresses and bytes."""

    sources: torch.Tensor
    targets: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]) -> Spans:
        """Take the columns."""
        return cls(*(torch.tensor(column, dtype=torch.int64) for column in (sources, targets, sizes)))

    def merged(self) -> Spans:
        """Return them with copies that continue each other on both sides made one.

        Such a copy may span allocations that lie side by side, which is nothing to a kernel, but an error to the copy
        engines.
        """
        if not len(self.sizes):
            return self
        order = torch.argsort(self.sources)
        source, target, size = self.sources[order], self.targets[order], self.sizes[order]
        begins = torch.ones(len(size), dtype=torch.bool)
        begins[1:] = (source[1:] != (source + size)[:-1]) | (target[1:] != (target + size)[:-1])
        total = torch.zeros(int(begins.sum()), dtype=torch.int64).index_add_(0, begins.cumsum(0) - 1, size)
        return Spans(source[begins], target[begins], total)

    def where(self, chosen: torch.Tensor) -> Spans:
        """Return those that a mask chooses."""
        return Spans(self.sources[chosen], self.targets[chosen], self.sizes[chosen])

    def after(self, done: torch.Tensor) -> Spans:
        """Return what is left when the first ``done`` bytes of each are copied."""
        return Spans(self.sources + done, self.targets + done, self.sizes - done)

    def rows(self, piece: int) -> torch.Tensor:
        """Cut them into rows of at most ``piece`` bytes: int64 ``[rows, 3]`` of source, target and bytes."""
        count = (self.sizes + piece - 1) // piece
        which = torch.repeat_interleave(torch.arange(len(count)), count)
        start = (torch.arange(len(which)) - (count.cumsum(0) - count)[which]) * piece
        length = torch.minimum(self.sizes[which] - start, torch.tensor(piece))
        return torch.stack((self.sources[which] + start, self.targets[which] + start, length), dim=1)


@attrs.frozen
class Table:
    """What the kernel walks, int64 ``[rows, 3]`` each.

    Attributes:
        wide: rows whose addresses and lengths are multiples of 16 bytes.
        narrow: the others: what is left at the end of a tensor, and tensors that lie askew.
    """

    wide: torch.Tensor
    narrow: torch.Tensor

    @classmethod
    def of(cls, spans: Spans, piece: int = _PIECE) -> Table:
        """Make the table, on the CPU."""
        aligned = (spans.sources % _WIDE == 0) & (spans.targets % _WIDE == 0)
        wide = torch.where(aligned, spans.sizes // _WIDE * _WIDE, 0)
        return cls(attrs.evolve(spans, sizes=wide).rows(piece), spans.after(wide).rows(piece))


class Copies:
    """Copies that are run again and again.

    Args:
        spans: what to copy; the addresses must be valid on ``device`` whenever it runs.
        device: the GPU that copies.
        peer: whether the sources lie on another GPU.
    """

    def __init__(self, spans: Spans, device: torch.device, peer: bool) -> None:
        by_engine = spans.sizes >= _ENGINE_BYTES if peer and cuda.has_batches() else spans.sizes < 0
        large, table = spans.where(by_engine), Table.of(spans.where(~by_engine).merged())
        self._device = device
        self._batch = None
        if len(large.sizes):
            self._batch = cuda.Batch(large.sources.tolist(), large.targets.tolist(), large.sizes.tolist())
        self._wide, self._narrow = table.wide.to(device), table.narrow.to(device)
        self.nbytes = self._wide.nbytes + self._narrow.nbytes
        """Device memory that the table takes."""

    def run(self, stream: torch.cuda.Stream) -> None:
        """Queue all copies on ``stream``, which must be the current one, on ``device``."""
        if self._batch is not None:
            self._batch.run(stream.cuda_stream, self._device.index)
        if len(self._wide) or len(self._narrow):
            self._launch()

    def _launch(self) -> None:
        import triton.language as tl

        from weight_transfer_ipc.kernels import copy_pieces

        for rows, element, width in ((self._wide, tl.int32, _WIDE), (self._narrow, tl.uint8, 1)):
            if len(rows):
                copy_pieces[(len(rows),)](rows, element, _TILE[width], num_warps=8)


@cache
def has_kernel() -> bool:
    """Whether the kernel can run here; says so once if it cannot."""
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "Triton is not installed: the ipc backend copies with torch's own operations, at about two thirds of the "
            "speed; pip install triton"
        )
        return False
    return True
