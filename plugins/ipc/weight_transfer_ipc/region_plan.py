"""What a worker takes of one trainer rank: which pieces are read in place, and which come through its ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from weight_transfer.authoring import Pieces, bucket_views, torch_dtype, typed_view
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_ipc.blocks import Blocks
from weight_transfer_ipc.ring import RING
from weight_transfer_ipc.shares import Share, shard_manifest
from weight_transfer_ipc.views import views_of

if TYPE_CHECKING:
    from weight_transfer.authoring import IncomingRegions


@attrs.frozen(eq=False)
class RankPlan:
    """The pieces of one rank, and where they come from.

    Attributes:
        rank: the trainer rank.
        pieces: those that are read where they lie.
        exact: of each of these whether its shard has the weight's dtype, so that its bytes are copied as they are.
        shards: its shards, as the pieces count them, over mapped memory; None for those that are not read in place.
        blocks: what goes through the ring; None if this worker takes nothing of that.
        staged: the pieces that come through the ring, cut along the blocks, which they count as shards.
        staged_views: the blocks in the ring.
    """

    rank: int
    pieces: Pieces
    exact: NDArray[np.bool_]
    shards: list[torch.Tensor | None]
    blocks: Blocks | None
    staged: Pieces
    staged_views: list[torch.Tensor]

    @classmethod
    def of(cls, incoming: IncomingRegions, rank: int, share: Share, memory: Mapping[int, torch.Tensor]) -> RankPlan:
        """Plan what comes from a rank, over ``memory`` (bytes by segment id).

        Raises:
            ManifestMismatchError: the share does not fit the layout or the memory.
        """
        manifest = shard_manifest(incoming.layout, rank)
        shards: list[torch.Tensor | None] = [None] * len(manifest.params)
        exact, in_place = np.zeros((2, len(shards)), dtype=np.bool_)
        for name, view in views_of(share.export, manifest, memory):
            number = int(name)
            shards[number], in_place[number] = view, True
            exact[number] = view.dtype is torch_dtype(manifest.params[number].dtype)
        pieces = incoming.pieces.of_rank(rank)
        direct = pieces.where(np.flatnonzero(in_place[pieces.shard]))
        staged = pieces.where(np.flatnonzero(~in_place[pieces.shard]))
        found = rank, direct, exact[direct.shard], shards
        if not len(staged):
            return cls(*found, None, staged, [])
        ring = memory.get(RING)
        if share.ring is None or ring is None or ring.nbytes < share.ring.nbytes:
            raise ManifestMismatchError(f"The ring of trainer rank {rank} has no memory.", backend="ipc")
        if not {*staged.shard.tolist()} <= {*share.staged} <= {*range(len(shards))}:
            raise ManifestMismatchError(f"Trainer rank {rank} does not send a shard of which it has pieces to send.")
        blocks = Blocks.of(manifest, share.staged, share.ring.bucket_bytes)
        return cls(*found, blocks, blocks.cut(staged), _views(blocks, share.ring.buffers(ring)))

    def in_bucket(self, index: int) -> Pieces:
        """Return the staged pieces that lie in a bucket."""
        assert self.blocks is not None
        buckets = np.array(self.blocks.buckets, dtype=np.int64)
        return self.staged.where(np.flatnonzero(buckets[self.staged.shard] == index))


def _views(blocks: Blocks, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    views = []
    for index, slots in enumerate(blocks.plan.buckets):
        some = bucket_views(slots, buffers[index % len(buffers)])
        views += [typed_view(view, blocks.plan.params[slot.param]) for slot, view in zip(slots, some, strict=True)]
    return views
