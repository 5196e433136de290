"""The tensors that a backend copies into its buckets, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from weight_transfer.model.manifest import ParamMeta
    from weight_transfer.model.source import WeightSource


def staged_tensors(source: WeightSource, staged: Sequence[ParamMeta]) -> Iterator[torch.Tensor]:
    """Yield the tensors of ``staged``, a part of the source's manifest in its order, for a `Packer`.

    Those that are cast come uncast if all of them are at hand; else they come as iteration yields them.
    """
    uncast = uncast_tensors(source, staged)
    if uncast is not None:
        return iter(uncast)
    wanted = {param.name for param in staged}
    return (tensor for name, tensor in source if name in wanted)


def uncast_tensors(source: WeightSource, params: Sequence[ParamMeta]) -> list[torch.Tensor] | None:
    """Return the tensors of ``params`` for a copy that converts; None if none is cast, or not all are at hand."""
    masters = source.masters()
    if not masters or source.collective:
        return None
    resident = source.resident()
    found = [masters.get(param.name, resident.get(param.name)) for param in params]
    tensors = [tensor.detach() for tensor in found if tensor is not None]
    return tensors if len(tensors) == len(params) else None
