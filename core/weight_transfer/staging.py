"""The tensors that a backend copies into its buckets, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from weight_transfer.manifest import ParamMeta
    from weight_transfer.source import WeightSource


def staged_tensors(source: WeightSource, staged: Sequence[ParamMeta]) -> Iterator[torch.Tensor]:
    """Yield the tensors of ``staged``, a part of the source's manifest in its order, for a `Packer`.

    Those that are cast come uncast if all of them are at hand, because the copy into the bucket can convert; else they
    come as iteration yields them.
    """
    masters, resident = source.masters(), source.resident()
    at_hand = [masters.get(param.name, resident.get(param.name)) for param in staged] if masters else [None]
    if not source.collective and not any(tensor is None for tensor in at_hand):
        return (tensor.detach() for tensor in at_hand if tensor is not None)
    wanted = {param.name for param in staged}
    return (tensor for name, tensor in source if name in wanted)
