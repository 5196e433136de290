"""Which regions of each weight a worker keeps, and where: what loaders say, and how whole weights get there.

Three kinds of loaders know: `KernelFormatLoader`, whose targets are the model's own parameters or their shards;
`DeclaredLoader`, whose targets the user names; and one that has watched a model's own loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from weight_transfer.errors import ConfigError
from weight_transfer.model.bits import as_bits
from weight_transfer.model.regions import Region
from weight_transfer.model.sharding import shards_of
from weight_transfer.model.shards import Target
from weight_transfer.model.source import is_sharded

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.model.manifest import Manifest

Targets = Mapping[str, Sequence[Target]]
"""Targets by the name under which a weight travels. No sequence: the weight goes whole, through ``load_weights``; an
empty one: the worker keeps nothing of it."""

NO_TARGETS: Targets = {}
"""What a loader says that has none: always the same object, since callers compare mappings by identity."""

Needs = Mapping[str, Target | Sequence[Target]] | Callable[["Manifest"], Mapping[str, Target | Sequence[Target]]]
"""What a user declares: targets by name, or a function that returns them for a manifest."""


@runtime_checkable
class RegionLoader(Protocol):
    """A loader that knows which regions of weights it keeps, and where they belong."""

    def targets(self, manifest: Manifest) -> Targets:
        """Return the targets of the manifest's weights; the same object while none of them changes.

        It may be called before an update, or after its ``begin``, and changes nothing. No two targets share memory.
        Weights that arrive whole are scattered by the loader itself, when it is called.

        Raises:
            ManifestMismatchError: the weights do not fit.
        """


def own_targets(name: str, tensor: Tensor) -> list[Target]:
    """Return the targets of a model's own weight: the whole of it, or the shard of this rank.

    Raises:
        ConfigError: it is sharded in a way that has no regions; it is named.
    """
    if not is_sharded(tensor):
        return [Target(Region.whole(tensor.shape), tensor)]
    shards = shards_of(tensor)
    if shards is None:
        raise ConfigError(
            f"Weight {name!r} is sharded ({getattr(tensor, 'placements', type(tensor).__name__)}), and nobody can say "
            "what this rank keeps of it; give the receiver a load_weights of your own, or declare what it needs."
        )
    return [Target(shard.region, shard.tensor) for shard in shards]


def tensors_of(targets: Targets) -> list[Tensor]:
    """Return the tensors of all targets, in the mapping's order."""
    return [target.tensor for some in targets.values() for target in some]


def scatter(weight: Tensor, targets: Iterable[Target]) -> None:
    """Copy a whole weight, or what is kept of it, into its targets, bit for bit."""
    with torch.no_grad():
        for target in targets:
            as_bits(target.tensor).copy_(as_bits(weight[target.region.slices]))
