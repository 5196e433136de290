"""What a trainer rank says of its shards: where each lies that workers read in place, and which ones take the ring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from weight_transfer.authoring import Export, Layout, Manifest, ParamMeta, structure, unstructure
from weight_transfer.errors import ManifestMismatchError
from weight_transfer_ipc.infos import DeviceMemory
from weight_transfer_ipc.ring import RingLayout

if TYPE_CHECKING:
    from weight_transfer.authoring import OutgoingRegions


@attrs.frozen(kw_only=True)
class Share:
    """Where the shards of a trainer rank are.

    Attributes:
        export: those that are read in place, in the order of `Layout.shards`.
        staged: the numbers of those that go through the ring.
        device_memory: the memory behind the export's segments, if it is a GPU's; host memory goes over the socket.
        ring: the ring for the staged ones, if there are any.
        keep_mapped: whether the worker keeps the memory mapped until the next update.
    """

    export: Export
    staged: tuple[int, ...] = ()
    device_memory: DeviceMemory | None = None
    ring: RingLayout | None = None
    keep_mapped: bool = True

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        wire: dict[str, Any] = unstructure(self)
        return wire

    @classmethod
    def from_wire(cls, data: Any, rank: int) -> Share:
        """Build it from `to_wire`.

        Raises:
            ManifestMismatchError: it is something else.
        """
        try:
            share: Share = structure(data, cls, f"the share of trainer rank {rank}")
        except ValueError as error:
            raise ManifestMismatchError(
                f"Trainer rank {rank} said of its shards what this version does not know.",
                backend="ipc",
                cause=str(error),
            ) from error
        return share


def shard_manifest(layout: Layout, rank: int) -> Manifest:
    """Return a rank's shards as parameters of their own, named by their numbers, of the weights' dtypes."""
    params = layout.manifest.params
    shards = layout.shards(rank)
    return Manifest(ParamMeta(str(n), params[index].dtype, region.shape) for n, (index, region) in enumerate(shards))


@attrs.frozen(eq=False)
class TakenShards:
    """What workers take of a rank.

    Attributes:
        manifest: all of its shards; see `shard_manifest`.
        tensors: those that some worker takes, by name.
    """

    manifest: Manifest
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, outgoing: OutgoingRegions) -> TakenShards:
        """Find them."""
        taken: set[int] = set()
        for taker in outgoing.takers:
            taken.update(taker.pieces.shard.tolist())
        manifest = shard_manifest(outgoing.layout, outgoing.rank)
        if len(manifest.params) != len(outgoing.tensors):
            raise ManifestMismatchError(
                f"Trainer rank {outgoing.rank} has {len(outgoing.tensors)} shards, and its layout "
                f"{len(manifest.params)}.",
                backend="ipc",
            )
        return cls(manifest, {str(number): outgoing.tensors[number] for number in sorted(taken)})

    def staged(self, export: Export) -> tuple[int, ...]:
        """Return the numbers of those that workers cannot read where they lie."""
        return tuple(number for number in map(int, self.tensors) if export.segment_ids[number] < 0)

    def of_numbers(self, numbers: Iterable[int]) -> Sequence[Tensor]:
        """Return some of them."""
        return [self.tensors[str(number)] for number in numbers]
