"""Copies of whole weights on a GPU, with the digests of what they bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.copying.boxes import Boxes
from weight_transfer.copying.gpu import GpuCopies
from weight_transfer.memory.chunks import CHUNK, Words
from weight_transfer.memory.gpu_digests import SHORT, Chunks, GpuDigests

if TYPE_CHECKING:
    import torch

_WIDE = 16  # bytes of which addresses and sizes are multiples where the kernel copies and digests at once


class WeightCopies:
    """Copies that a GPU makes again and again, with digests of what they read if these are wanted.

    Args:
        targets: contiguous, on one GPU, none over another one. Whoever runs the copies sees to it that neither these
            nor the sources have moved.
        sources: of as many bytes each, contiguous, readable there.
        alone: queues the copies on the current stream, without digests.

    Attributes:
        nbytes: of each target.
    """

    def __init__(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], alone: Callable[[], object]
    ) -> None:
        self._targets, self._sources, self._alone = targets, sources, alone
        self.nbytes = [target.nbytes for target in targets]

    def run(self) -> None:
        """Queue them on the current stream of the device, which must be the current one."""
        self._alone()

    def run_noting(self) -> tuple[Sequence[int], GpuDigests]:
        """Queue them likewise, and digest what they read, except that of `others`.

        Returns:
            The numbers of the targets that are digested, and their digests.
        """
        noting = self._noting
        noting.others.run()
        return noting.numbers, GpuDigests(noting.chunks, noting.nbytes, copies=True)

    @property
    def others(self) -> dict[int, torch.Tensor]:
        """The targets whose bytes are to be digested where they lie then, by number."""
        return {number: self._targets[number] for number in self._noting.left}

    @property
    def table_bytes(self) -> int:
        """Device memory that the tables for digests take, once they were wanted."""
        noting: _Noting | None = vars(self).get("_noting")
        return noting.chunks.table_bytes + noting.others.nbytes if noting is not None else 0

    @cached_property
    def _noting(self) -> _Noting:
        device = self._targets[0].device
        to, at = (np.array([each.data_ptr() for each in some], np.int64) for some in (self._targets, self._sources))
        nbytes = np.array(self.nbytes, np.int64)
        fits = ((nbytes | to | at) % _WIDE == 0) & ((nbytes - 1) % CHUNK >= SHORT)
        numbers, left = np.flatnonzero(fits), np.flatnonzero(~fits)
        sizes = nbytes[numbers].astype(np.uint64)
        rest = Boxes.contiguous(at[left].tolist(), to[left].tolist(), nbytes[left].tolist())
        return _Noting(
            numbers.tolist(),
            sizes,
            Chunks.of(at[numbers], sizes, device, to[numbers]),
            left.tolist(),
            GpuCopies(rest, device),
        )


@attrs.frozen(eq=False)
class _Noting:
    """Copies by the kernel that digests, and those of what it cannot take.

    Attributes:
        numbers: of the targets that it copies.
        nbytes: of these.
        chunks: of these.
        left: the numbers of all others.
        others: copies them.
    """

    numbers: list[int]
    nbytes: Words
    chunks: Chunks
    left: list[int]
    others: GpuCopies
