"""What this trainer rank holds of its weights: the regions of ``DTensor`` shards, on any mesh."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weight_transfer.model.cuts import Cut, blocks_of, is_one_order
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Shard
from weight_transfer.model.state import is_dense, is_lazy
from weight_transfer.model.whereabouts import Whereabouts


def shards_of(tensor: torch.Tensor) -> tuple[Shard, ...] | None:
    """Return what this rank holds of a ``DTensor``: one shard for each block that is contiguous in the full tensor.

    Their tensors are the memory of the local tensor, or views of it. A rank outside the mesh holds none, and neither
    does one whose part is empty.

    Returns:
        None if that cannot be said: the tensor is a sum that is still to be made (``Partial``), of another type, cut
        otherwise than its placements say or so that these can be read in two ways, or on a mesh whose ranks do not
        ascend.
    """
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None or type(tensor) is not module.DTensor:
        return None
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # noqa: SLF001  (to_local() would record)
    cuts = _cuts(tensor)
    if cuts is None or not is_dense(local) or is_lazy(local) or local.dtype is not tensor.dtype:
        return None
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if coordinate is None:
        return ()
    shape, blocks = blocks_of(tensor.shape, cuts)
    if shape != tuple(local.shape):
        return None
    if len(blocks) == 1:
        return (Shard(blocks[0][0], local),)
    with torch.no_grad():
        return tuple(Shard(region, local[within.slices]) for region, within in blocks)


class LocalParts:
    """What this rank holds of sharded tensors."""

    def __init__(self, sharded: Sequence[torch.Tensor]) -> None:
        self._sharded = sharded
        self._specs, self._locals = list(map(_spec, sharded)), list(map(_local, sharded))
        self._whereabouts = Whereabouts(self._locals)

    @property
    def unchanged(self) -> bool:
        """Whether none of them was placed otherwise, replaced or moved."""
        return self.are_held and self.unmoved

    @property
    def are_held(self) -> bool:
        """Whether the sharded tensors are placed as they were, and hold the same tensors."""
        return all(map(operator.is_, map(_spec, self._sharded), self._specs)) and all(
            map(operator.is_, map(_local, self._sharded), self._locals)
        )

    @property
    def unmoved(self) -> bool:
        """Whether what they held lies where and as it lay."""
        return self._whereabouts.unchanged


class LocalShards:
    """The shards of some weights, made anew only if one of them has changed."""

    def __init__(self) -> None:
        self._read: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None
        self._shards: Mapping[str, Sequence[Shard]] = {}
        self._parts = LocalParts(())

    def of(
        self, weights: Mapping[str, torch.Tensor], resident: Mapping[str, torch.Tensor], recalled: bool = False
    ) -> Mapping[str, Sequence[Shard]]:
        """Return the shards by name, without those weights of which nobody can say what this rank holds.

        The mapping is the same object as long as the arguments are the same objects and no local tensor was replaced,
        moved or resized.

        Args:
            weights: sharded and plain ones.
            resident: those plain ones that keep their memory: each is one shard, common to all ranks.
            recalled: whether only that is looked at where the local tensors lie; the rest is left to `are_held`.
        """
        known = self._read is not None and self._read[0] is weights and self._read[1] is resident
        if not known or not (self._parts.unmoved if recalled else self._parts.unchanged):
            self._take(weights, resident)
        return self._shards

    @property
    def are_held(self) -> bool:
        """Whether the weights that `of` saw last hold the same local tensors, placed as they were."""
        return self._parts.are_held

    def _take(self, weights: Mapping[str, torch.Tensor], resident: Mapping[str, torch.Tensor]) -> None:
        shards: dict[str, Sequence[Shard]] = {}
        sharded = []
        for name, tensor in weights.items():
            if name in resident:
                if not is_lazy(tensor):
                    shards[name] = (Shard(Region.whole(tensor.shape), tensor, common=True),)
                continue
            own = shards_of(tensor)
            if own is not None:
                shards[name] = own
                sharded.append(tensor)
        self._shards, self._parts, self._read = shards, LocalParts(sharded), (weights, resident)


_spec = operator.attrgetter("_spec")
_local = operator.attrgetter("_local_tensor")


def _cuts(tensor: Any) -> list[Cut] | None:
    """Return how a ``DTensor`` is cut for this rank, first cut first; None if a placement is none that we know."""
    from torch.distributed.tensor.placement_types import Replicate, _StridedShard
    from torch.distributed.tensor.placement_types import Shard as Sharded

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(type(placement) not in (Sharded, _StridedShard, Replicate) for placement in placements):
        return None
    cut_along = [mesh_dim for mesh_dim, placement in enumerate(placements) if type(placement) is not Replicate]
    if not all((mesh.mesh.diff(dim=mesh_dim) > 0).all() for mesh_dim in cut_along):
        return None  # torch gathers in the order of ranks, and not of the mesh
    strips = {mesh_dim: int(getattr(placements[mesh_dim], "split_factor", 1)) for mesh_dim in cut_along}
    for dim, size in enumerate(tensor.shape):
        own = [mesh_dim for mesh_dim in cut_along if placements[mesh_dim].dim % tensor.ndim == dim]
        if not is_one_order(size, tuple((mesh.size(mesh_dim), strips[mesh_dim]) for mesh_dim in own)):
            return None
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    order = getattr(tensor._spec, "shard_order", None)  # noqa: SLF001  (nothing public tells it)
    mesh_dims = range(mesh.ndim) if not order else [mesh_dim for entry in order for mesh_dim in entry.mesh_dims]
    return [
        Cut(placements[mesh_dim].dim % tensor.ndim, mesh.size(mesh_dim), coordinate[mesh_dim], strips[mesh_dim])
        for mesh_dim in mesh_dims
        if mesh_dim in cut_along
    ]
