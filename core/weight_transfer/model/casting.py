"""A source whose weights travel in other dtypes than the trainer keeps them in: fp32 masters, bf16 servers."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import partial
from typing import TYPE_CHECKING

import attrs

from weight_transfer.config.settings import RECEIVER, parse_cast
from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest, torch_dtype
from weight_transfer.model.source import NO_SHARDS, WrappingSource, as_source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from weight_transfer.model.manifest import ParamMeta
    from weight_transfer.model.shards import Shard
    from weight_transfer.model.source import WeightSource


class CastSource(WrappingSource):
    """Casts the floating point weights of a module or source, on their own device, one at a time.

    The bits are those of ``tensor.to(dtype)``. Integers, bool and complex numbers stay as they are. Sharded weights are
    cast before they are gathered.

    Args:
        weights: the module, or any source.
        dtypes: a dtype's name by pattern, as in ``{"*": "bfloat16", "*.router.*": "float32"}``. Patterns are those of
            `fnmatch.fnmatchcase` over whole names; the last one that matches counts, and without one a weight stays
            as it is.

    Raises:
        ConfigError: a dtype is unknown or not a floating point one; or, when the weights are read, a pattern matches
            none of them.
    """

    def __init__(self, weights: nn.Module | WeightSource, dtypes: Mapping[str, str | torch.dtype]) -> None:
        patterns = parse_cast(dtypes)
        if RECEIVER in patterns.values():
            raise ConfigError(
                f'CastSource knows no workers, so {RECEIVER!r} has no meaning here; set cast = {{"*" = "{RECEIVER}"}} '
                "in the sender's configuration, or name a dtype."
            )
        super().__init__(as_source(weights))
        self._choose: Callable[[Manifest], Mapping[str, str]] = partial(declared_dtypes, patterns=patterns)
        self._forget()

    @classmethod
    def choosing(cls, source: WeightSource, choose: Callable[[Manifest], Mapping[str, str]]) -> CastSource:
        """Return a source that asks ``choose`` for the dtypes by name, once for each new manifest of ``source``."""
        made = cls(source, {})
        made._choose = choose
        return made

    def _forget(self) -> None:
        self._read: Manifest | None = None
        self._manifest = Manifest(())
        self._dtypes: dict[str, torch.dtype] = {}
        self._found: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None
        self._resident: Mapping[str, torch.Tensor] = {}
        self._masters: Mapping[str, torch.Tensor] = {}
        self._uncast: Mapping[str, Sequence[Shard]] | None = None
        self._shards: Mapping[str, Sequence[Shard]] = NO_SHARDS

    def manifest(self) -> Manifest:
        """Return the manifest with the cast dtypes; the same object while the inner one is the same object."""
        read = self.source.manifest()
        if read is not self._read:
            chosen = self._choose(read)
            params = [_cast(param, chosen.get(param.name, param.dtype)) for param in read.params]
            self._dtypes = {
                new.name: torch_dtype(new.dtype)
                for old, new in zip(read.params, params, strict=True)
                if new.dtype != old.dtype
            }
            self._manifest = attrs.evolve(read, params=params) if self._dtypes else read
            self._read, self._found, self._uncast = read, None, None
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.cast(self._dtypes) if self._dtypes else iter(self.source)

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.cast(self._dtypes, names)

    def resident(self) -> Mapping[str, torch.Tensor]:
        """Return the inner source's resident tensors that are not cast."""
        self._look()
        return self._resident

    def masters(self) -> Mapping[str, torch.Tensor]:
        """Return the inner source's resident tensors that are cast once, here or there."""
        self._look()
        return self._masters

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """Return the inner source's, uncast: the copy casts them. What would have to be cast twice is absent."""
        shards = self.source.shards()
        if shards is not self._uncast:
            self._uncast = shards
            twice = {name for name in shards.keys() & self._dtypes.keys() if self._is_cast(name, shards[name])}
            self._shards = {name: own for name, own in shards.items() if name not in twice} if twice else shards
        return self._shards

    def _is_cast(self, name: str, shards: Sequence[Shard]) -> bool:
        """Whether the inner source already has these cast."""
        return self._read is not None and any(
            shard.tensor.dtype is not torch_dtype(self._read.by_name[name].dtype) for shard in shards
        )

    def _look(self) -> None:
        found = self.source.resident(), self.source.masters()
        if self._found is None or any(map(operator.is_not, found, self._found)):
            resident, masters = found
            self._resident = {name: tensor for name, tensor in resident.items() if name not in self._dtypes}
            self._masters = {name: tensor for name, tensor in resident.items() if name in self._dtypes}
            self._masters |= {name: tensor for name, tensor in masters.items() if name not in self._dtypes}
            self._found = found

    @property
    def reuses_memory(self) -> bool:
        """Whether the inner source does: what is cast here is new each time, the rest is passed on."""
        return self.source.reuses_memory

    def __repr__(self) -> str:
        return f"{self.source!r}, cast"


def declared_dtypes(manifest: Manifest, patterns: Mapping[str, str]) -> dict[str, str]:
    """Return the dtype's name that ``patterns`` give to each floating point weight that one of them matches.

    What is tied matches under each of its names.

    Raises:
        ConfigError: a pattern matches no weight.
    """
    travels_as = {param.name: param.name for param in manifest.params} | dict(manifest.aliases)
    found: dict[str, str] = {}
    for pattern, dtype in patterns.items():
        matches = re.compile(translate(pattern)).match
        names = [name for called, name in travels_as.items() if matches(called)]
        if not names and travels_as:
            some = manifest.params[len(manifest.params) // 2].name
            raise ConfigError(
                f"cast: no weight matches the pattern {pattern!r}; weights have names such as {some!r}, and a pattern "
                "stands for a whole name: '*.router.*'."
            )
        found.update((name, dtype) for name in names if torch_dtype(manifest.by_name[name].dtype).is_floating_point)
    return found


def _cast(param: ParamMeta, dtype: str) -> ParamMeta:
    return param if dtype == param.dtype else attrs.evolve(param, dtype=dtype)
