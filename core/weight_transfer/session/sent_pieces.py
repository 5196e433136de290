"""Digests of what a trainer rank gives by region, worker by worker."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.memory.digest_table import DigestTable
from weight_transfer.memory.integrity import Reading
from weight_transfer.model.manifest import torch_dtype
from weight_transfer.plan.pieces import Pieces
from weight_transfer.plan.views import sources_of

if TYPE_CHECKING:
    import torch

    from weight_transfer.copying.boxes import Integers
    from weight_transfer.plan.exchange import OutgoingRegions


class SentPieces:
    """The pieces of all workers, each different one once.

    Args:
        outgoing: what the rank gives. Which pieces there are is worked out when it is first asked for.
    """

    def __init__(self, outgoing: OutgoingRegions) -> None:
        self.outgoing = outgoing

    def tables(self) -> dict[str, str]:
        """Return the `DigestTable` of each worker that takes something, as text by its number as text."""
        _, _, numbers = self._pieces
        digests = self._reading.digests()
        return {str(worker): DigestTable.of(digests[own]).to_text() for worker, own in numbers.items()}

    @cached_property
    def _reading(self) -> Reading:
        views, dtypes, _ = self._pieces
        return Reading(views, dtypes)

    @cached_property
    def _pieces(self) -> tuple[list[torch.Tensor], list[torch.dtype], dict[int, Integers]]:
        """The different pieces, the dtypes in which they are sent, and the numbers of those of each worker."""
        takers = [taker for taker in self.outgoing.takers if len(taker.pieces)]
        if not takers:
            return [], [], {}
        columns = ([getattr(it.pieces, field.name) for it in takers] for field in attrs.fields(Pieces))
        pieces = Pieces(*map(np.concatenate, columns))
        boxes = np.column_stack((pieces.shard, pieces.source_start, pieces.shape))
        _, first, number_of = np.unique(boxes, axis=0, return_index=True, return_inverse=True)
        ends = np.cumsum([len(taker.pieces) for taker in takers])[:-1]
        numbers = dict(zip((taker.worker for taker in takers), np.split(number_of.reshape(-1), ends), strict=True))
        params = self.outgoing.layout.manifest.params
        dtypes = [torch_dtype(params[number].dtype) for number in pieces.param[first].tolist()]
        return sources_of(pieces.where(first), self.outgoing.tensors), dtypes, numbers
