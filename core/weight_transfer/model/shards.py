"""Regions with the tensors in which their bytes lie: a trainer rank's shards, and a worker's targets."""

from __future__ import annotations

import attrs
from torch import Tensor

from weight_transfer.model.regions import Region


@attrs.frozen(eq=False)
class Shard:
    """A region of a weight, and the tensor of this trainer rank that holds it.

    Attributes:
        region: within the full shape.
        tensor: of the region's shape, with any strides. It keeps its memory between updates. Its dtype is the weight's,
            or, if the weight is cast, the one that it is cast from.
        common: whether every rank has the same tensor without having declared it a replica: then rank 0's is sent.
    """

    region: Region
    tensor: Tensor
    common: bool = False


@attrs.frozen(eq=False)
class Target:
    """A region of a weight that a worker keeps, and the tensor where its bytes belong.

    Attributes:
        region: within the full shape.
        tensor: of the region's shape and the weight's dtype, with any strides.

    Raises:
        ValueError: the tensor has another shape than the region.
    """

    region: Region
    tensor: Tensor

    def __attrs_post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.region.shape:
            raise ValueError(
                f"a target's tensor must have its region's shape {list(self.region.shape)}, "
                f"got {list(self.tensor.shape)}"
            )
