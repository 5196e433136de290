"""The weights of a trainer that lays them out over its ranks in its own way."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Shard
from weight_transfer.model.source import WeightSource, full_tensor, is_sharded
from weight_transfer.model.state import is_lazy, require_readable
from weight_transfer.model.whereabouts import Whereabouts

Row = tuple[str, Sequence[int], Sequence[int], torch.Tensor]
"""A shard: its weight's name and full shape, the offset of its first element there, and the tensor of this rank."""


class ShardedSource(WeightSource):
    """What this trainer rank holds of the weights, as the trainer says: for Megatron and other layouts of one's own.

    Every rank makes one of what it has itself, under the names and with the full shapes that the workers expect::

        def shards():
            for name, tensor in model.named_parameters():
                rows = tensor.shape[0]  # a column-parallel weight: this rank has some of the rows
                yield name, (rows * tp_size, tensor.shape[1]), (tp_rank * rows, 0), tensor

        sender.send(wt.ShardedSource(shards))

    A weight may have several shards on a rank, none (it is then left out), and the same ones on several ranks, which
    are replicas. Together the ranks must hold all of each weight. Tensors are the trainer's own and may be strided;
    nothing is copied or gathered. A weight of which this rank has only parts goes by region, or not at all.

    Args:
        shards: a function that returns or yields ``(name, full shape, offset, tensor)`` for each shard, and is called
            at each update, so that replaced tensors are noticed; or these themselves, in a list that is read again at
            each update.

    Raises:
        ConfigError: a shard is none: it lies beyond the full shape, its tensor has no bytes of its own, or two shards
            of one weight disagree about full shape or dtype; it is named. Reading it again may raise it, too.
    """

    def __init__(self, shards: Callable[[], Iterable[Row]] | Iterable[Row]) -> None:
        if isinstance(shards, (Mapping, nn.Module)) or not (callable(shards) or isinstance(shards, Iterable)):
            raise ConfigError(
                "ShardedSource takes (name, full shape, offset, tensor) for each shard, or a function that returns "
                f"these, and got a {type(shards).__name__}."
            )
        self._given = tuple(shards) if isinstance(shards, Iterator) else shards
        self._places: tuple[list[Any], ...] = ([], [], [])
        self._tensors: list[torch.Tensor] = []
        self._whereabouts = Whereabouts(())
        self._manifest = Manifest(())
        self._shards: Mapping[str, Sequence[Shard]] = {}
        self._resident: Mapping[str, torch.Tensor] = {}
        self.manifest()

    def manifest(self) -> Manifest:
        """Return the weights of which this rank holds something, in the order in which they were given.

        Raises:
            ConfigError: as at construction.
        """
        rows = list(map(_row, self._given() if callable(self._given) else self._given))
        names, shapes, offsets, tensors = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
        places = names, shapes, offsets
        if not (
            places == self._places and all(map(operator.is_, tensors, self._tensors)) and self._whereabouts.unchanged
        ):
            self._take(rows)
            self._places, self._tensors, self._whereabouts = places, tensors, Whereabouts(tensors)
        return self._manifest

    def _take(self, rows: Sequence[Row]) -> None:
        shards: dict[str, list[Shard]] = {}
        params: dict[str, ParamMeta] = {}
        for name, shape, offset, tensor in rows:
            shard = _shard(name, shape, offset, tensor)
            param = ParamMeta(name, dtype_name(tensor.dtype), shape)
            known = params.setdefault(name, param)
            if known != param:
                raise ConfigError(f"Shards of {name!r} disagree: one is of {known}, another one of {param}.")
            others = shards.setdefault(name, [])
            if shard.region.volume and any(shard.region == other.region for other in others):
                raise ConfigError(f"Shard {shard.region} of {name!r} was given twice; give each part of a weight once.")
            others.append(shard)
        manifest = Manifest(params.values())
        if manifest != self._manifest:
            self._manifest = manifest
        self._shards = {name: tuple(own) for name, own in shards.items()}
        self._resident = {
            name: shard.tensor
            for name, own in shards.items()
            for shard in own
            if shard.region == Region.whole(params[name].shape)
        }

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return map(self._complete, self._manifest.by_name)

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return (self._complete(name) for name in self._manifest.by_name if name in names)

    def _complete(self, name: str) -> tuple[str, torch.Tensor]:
        if name not in self._resident:
            parts = ", ".join(str(shard.region) for shard in self._shards[name])
            raise ConfigError(
                f"This trainer rank has only {parts} of {self._manifest.by_name[name]}, which can therefore go by "
                "region alone: that takes a backend with regions, and workers that say what they keep of it."
            )
        return name, full_tensor(self._resident[name])

    def resident(self) -> Mapping[str, torch.Tensor]:
        """Return the weights of which this rank has all, in one shard."""
        return self._resident

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        return self._shards

    @property
    def device(self) -> str:
        first = next((own[0].tensor for own in self._shards.values()), None)
        return "cpu" if first is None else str(first.device)

    @property
    def whole(self) -> bool:
        """False: each rank lists what it holds itself."""
        return False

    @property
    def reuses_memory(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"ShardedSource({len(self._manifest.params)} weights)"


def _row(row: Any) -> Row:
    """Return a row with sizes as tuples."""
    try:
        name, shape, offset, tensor = row
        sizes, begin = tuple(map(operator.index, shape)), tuple(map(operator.index, offset))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A shard is (name, full shape, offset, tensor), got {_brief(row)}.") from error
    if not isinstance(name, str) or not name or not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"A shard is (name, full shape, offset, tensor), got {_brief(row)}.")
    return name, sizes, begin, tensor


def _brief(row: Any) -> str:
    return str([type(each).__name__ for each in row]) if isinstance(row, (tuple, list)) else type(row).__name__


def _shard(name: str, shape: Sequence[int], offset: Sequence[int], tensor: torch.Tensor) -> Shard:
    """Return what a row stands for.

    Raises:
        ConfigError: nothing.
    """
    if is_sharded(tensor):
        raise ConfigError(
            f"Shard of {name!r} is a {type(tensor).__name__}, which knows its own layout: send the module itself, or "
            "give its local tensor."
        )
    require_readable(name, tensor)
    if is_lazy(tensor):
        raise ConfigError(
            f"Shard of {name!r} is a conjugate or negative view, whose bytes are not its values; make it a plain "
            "tensor, with resolve_conj() or resolve_neg()."
        )
    if not len(shape) == len(offset) == tensor.ndim:
        raise ConfigError(
            f"Shard of {name!r} has {tensor.ndim} dimensions, its offset {list(offset)} and the full shape "
            f"{list(shape)} have {len(offset)} and {len(shape)}; all three must have as many as the weight."
        )
    ends = (start + size for start, size in zip(offset, tensor.shape, strict=True))
    if min((*shape, *offset), default=0) < 0 or any(end > size for end, size in zip(ends, shape, strict=True)):
        raise ConfigError(
            f"Shard of {name!r} at {list(offset)} of shape {list(tensor.shape)} lies beyond the full shape "
            f"{list(shape)}."
        )
    return Shard(Region(offset, tensor.shape), tensor)
