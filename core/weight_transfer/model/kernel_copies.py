"""Copies into layers on a GPU: their geometry is worked out once, and only addresses travel later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from weight_transfer.copying.boxes import Boxes, Views
from weight_transfer.copying.gpu import GpuCopies, has_kernel
from weight_transfer.copying.table import WIDE
from weight_transfer.errors import TransferError

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Integers
    from weight_transfer.model.copies import Landing, Move, Sources
    from weight_transfer.model.strided import Strided


class KernelCopies:
    """Copies that are made again and again, between memories that may lie elsewhere each time.

    Args:
        copies: numbers of sources, and what is copied of them.
    """

    def __init__(self, copies: Sequence[tuple[int, Move]]) -> None:
        self._casts = [pair for pair in copies if pair[1].copy.casts]
        exact = [pair for pair in copies if not pair[1].copy.casts]
        self._targets = list(dict.fromkeys((move.layer, move.copy.target) for _, move in exact))
        self._source_of = np.array([number for number, _ in exact], dtype=np.int64)
        place = {target: number for number, target in enumerate(self._targets)}
        self._target_of = np.array([place[move.layer, move.copy.target] for _, move in exact], dtype=np.int64)
        self._nbytes = np.array([move.nbytes for _, move in exact], dtype=np.int64)
        self._boxes = _boxes([move for _, move in exact])
        self._copies: tuple[torch.device, GpuCopies] | None = None
        self._known: tuple[Integers, torch.Tensor] | None = None

    @staticmethod
    def are_possible(landings: Iterable[Landing], sources: Sources) -> bool:
        """Whether all lies on one GPU, and the kernel can run."""
        gpu = sources.gpu
        return gpu is not None and all(landing.gpu == gpu for landing in landings) and has_kernel()

    def make(self, landings: Mapping[str, Landing], sources: Sources) -> None:
        """Queue the copies on the current stream of that GPU.

        Args:
            landings: by layer.
            sources: the weights.

        Raises:
            TransferError: a weight has other bytes than it had when it was recorded.
        """
        for number, move in self._casts:
            landings[move.layer].view(move).copy_(move.copy.frm.on(sources.tensors[number]))
        if not len(self._boxes):
            return
        gpu = sources.gpu
        assert gpu is not None
        self._require(sources)
        targets = np.array([landings[layer].tensors[name].data_ptr() for layer, name in self._targets], dtype=np.int64)
        bases = np.stack((sources.addresses[self._source_of], targets[self._target_of]), axis=1)
        with torch.cuda.device(gpu):
            if (bases % WIDE).any():
                GpuCopies(_moved(self._boxes, bases), gpu).run()
            else:
                self._run(bases, gpu)

    def _require(self, sources: Sources) -> None:
        found = sources.nbytes[self._source_of]
        if not np.array_equal(found, self._nbytes):
            place = int((found != self._nbytes).argmax())
            raise TransferError(
                f"A weight of {found[place]} bytes came where one of {self._nbytes[place]} was recorded; send weights "
                "of the shapes and dtypes that the manifest names."
            )

    def _run(self, bases: Integers, device: torch.device) -> None:
        if self._copies is None or self._copies[0] != device:
            self._copies, self._known = (device, GpuCopies(self._boxes, device, relative=True)), None
        if self._known is None or not np.array_equal(self._known[0], bases):
            self._known = bases, torch.from_numpy(bases).pin_memory().to(device, non_blocking=True)
        self._copies[1].run(self._known[1])


def _boxes(moves: Sequence[Move]) -> Boxes:
    """Return the copies with addresses from the start of each source and target; `Boxes.piece` counts moves."""
    dims = max((len(move.copy.to.shape) for move in moves), default=0) or 1
    itemsize = np.array([move.itemsize for move in moves], dtype=np.int64)

    def steps(views: Sequence[Strided]) -> Integers:
        return _columns([view.stride for view in views], dims, 0) * itemsize[:, None]

    sources, targets = [move.copy.frm for move in moves], [move.copy.to for move in moves]
    return Views(
        np.array([view.offset for view in sources], dtype=np.int64) * itemsize,
        np.array([view.offset for view in targets], dtype=np.int64) * itemsize,
        _columns([view.shape for view in targets], dims, 1),
        steps(sources),
        steps(targets),
        itemsize,
    ).boxes()


def _columns(rows: Sequence[Sequence[int]], dims: int, fill: int) -> Integers:
    table = np.full((len(rows), dims), fill, dtype=np.int64)
    for own, row in zip(table, rows, strict=True):
        own[: len(row)] = row
    return table


def _moved(boxes: Boxes, bases: Integers) -> Boxes:
    return attrs.evolve(boxes, source=boxes.source + bases[boxes.piece, 0], target=boxes.target + bases[boxes.piece, 1])
