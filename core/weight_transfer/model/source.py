"""Where the weights come from: any stream of named tensors, or a module of the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weight_transfer.errors import ConfigError
from weight_transfer.model.looking import Confidence
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.model.sharding import LocalShards
from weight_transfer.model.state import is_lazy
from weight_transfer.model.weights import ModuleWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from weight_transfer.model.looking import Look
    from weight_transfer.model.shards import Shard

NONE: Mapping[str, torch.Tensor] = MappingProxyType({})
"""No tensors; always the same object."""

NO_SHARDS: Mapping[str, Sequence[Shard]] = MappingProxyType({})
"""No shards; always the same object."""


class WeightSource(ABC):
    """A stream of named tensors that can be read again and again.

    Metadata and bytes are separate: `manifest` is cheap and moves nothing, iteration materialises.

    What a base class says of its tensors does not hold for a subclass that iterates anew: there `stream`, `resident`,
    `masters`, `shards`, `cast` and `reuses_memory` are those of this class again, unless the subclass has its own.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        iterates = _depth(cls, "__iter__")
        for name in ("stream", "resident", "masters", "shards", "cast", "reuses_memory"):
            if _depth(cls, name) > iterates:
                setattr(cls, name, vars(WeightSource)[name])

    @abstractmethod
    def manifest(self) -> Manifest:
        """Return what iteration will yield, in the same order; the same object while nothing changed.

        Called once at the beginning of each update, before anything else.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` once each, in the manifest's order, full and on one device.

        A tensor needs to be valid only until the next one is asked for; see `reuses_memory`. With sharded parameters
        this runs collectives, so all trainer ranks must iterate in lockstep.
        """

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield those called ``names`` alone, in order, without gathering or reading the others where possible."""
        return ((name, tensor) for name, tensor in self if name in names)

    def resident(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that need no materialising and keep their storage between updates, by name.

        A backend may export these once instead of copying them at each update.
        """
        return {}

    def masters(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that are as `resident` ones, but of another dtype than the manifest says, by name.

        A backend may let its own copy convert: ``target.copy_(tensor)`` gives the bits that iteration yields, without
        a tensor in between.
        """
        return NONE

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """Return what this trainer rank holds of the weights, by the manifest's names; called after `manifest`.

        Each worker may then take the regions that it keeps from the ranks that hold them, and nobody gathers. An empty
        sequence says that other ranks hold all of a weight. A weight that is absent cannot be sent by region: it is
        iterated.

        The mapping is the same object as long as every shard is the same region of the same memory.
        """
        return NO_SHARDS

    def cast(
        self, dtypes: Mapping[str, torch.dtype], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate (with ``names``: `stream`), with the tensors named in ``dtypes`` cast to these.

        Each cast tensor is a new one, with the bits of ``tensor.to``. Override it where a tensor can be cast before it
        is gathered.
        """
        for name, tensor in self if names is None else self.stream(names):
            yield name, tensor.to(dtypes[name]) if name in dtypes else tensor

    @property
    def device(self) -> str:
        """The torch device of the tensors that iteration yields."""
        return "cpu"

    @property
    def collective(self) -> bool:
        """Whether iteration runs collectives, and so must be finished on every rank even when an update fails."""
        return False

    @property
    def whole(self) -> bool:
        """Whether the manifest lists all the weights on every trainer rank, and not what one rank has of them alone."""
        return True

    @property
    def reuses_memory(self) -> bool:
        """Whether a tensor that iteration yielded may change, or be freed, once the next one is asked for.

        Say False only if each stays as it is for as long as somebody refers to it: that saves some engines a copy.
        """
        return True


def _depth(cls: type, name: str) -> int:
    """Return how far up from a class the base is that defines ``name``."""
    return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))


class WrappingSource(WeightSource):
    """A source made of another one, whose weights lie where those of the other do.

    Whether it `reuses_memory` is for each to say, since that depends on how it iterates.

    Args:
        source: the other one.
    """

    def __init__(self, source: WeightSource) -> None:
        self.source = source

    @property
    def device(self) -> str:
        return self.source.device

    @property
    def collective(self) -> bool:
        return self.source.collective

    @property
    def whole(self) -> bool:
        return self.source.whole


def as_source(weights: nn.Module | WeightSource) -> WeightSource:
    """Return ``weights`` as a source; a module becomes a `ModuleSource`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(weights, WeightSource):
        return weights
    if isinstance(weights, nn.Module):
        return ModuleSource(weights)
    raise ConfigError(f"Weights to send must be an nn.Module or a WeightSource, got {type(weights).__name__}.")


class ModuleSource(WeightSource):
    """The weights of an ``nn.Module``: parameters, persistent buffers, and what else its ``state_dict()`` holds.

    Names are those of ``state_dict()`` without the parts that wrappers add (``torch.compile``, data parallelism,
    activation checkpointing, PEFT). Tied weights are sent once. ``DTensor`` parameters (FSDP2, tensor parallel) are
    sent by region, or gathered one at a time with ``full_tensor()``, a collective: every trainer rank iterates the same
    module in the same order.

    What FSDP2 has unsharded for a forward pass is resharded before it is read: the copy would be stale after a step.

    Args:
        module: read anew by `manifest`, so that replaced parameters are noticed at each update.
        rename: maps a weight's name to the one under which it is sent, or to None if it is not to be sent.
        ignore: glob patterns of names that are not to be sent, such as ``"*_extra_state"``.
    """

    def __init__(
        self,
        module: nn.Module,
        rename: Callable[[str], str | None] | None = None,
        *,
        ignore: Sequence[str] = (),
    ) -> None:
        self.module = module
        self._rename = rename
        self._reader = ModuleWeights(module, ignore)
        self._read: Mapping[str, torch.Tensor] | None = None
        self._weights: Mapping[str, torch.Tensor] = {}
        self._resident: Mapping[str, torch.Tensor] = {}
        self._shards = LocalShards()
        self._manifest = Manifest(())
        self._collective = False
        self._confidence = Confidence()
        self._recalls = self._is_blind = False
        self._look: Look | None = None

    def recall(self, may: bool, *, blindly: bool = False) -> None:
        """Have `manifest` and `shards` speak of what was read last, if it lies where it lay, or else read anew.

        Then `confirm` tells later whether the module still had these tensors: looking at each module takes longer than
        to see where some tensors lie. It is not done while modules have changed in recent updates.

        Args:
            may: whether to; else everything is looked at first.
            blindly: where the tensors lie is not looked at either, but for the first: that `is_unmoved` does later, or
                `confirm`.
        """
        self._recalls = may and self._confidence.suffices
        self._is_blind = self._recalls and blindly and self._reader.can_be_recalled
        self._look = None

    def is_unmoved(self) -> bool:
        """Return whether what `recall` let `manifest` speak of lies where it lay: before anybody may read there."""
        if not self._is_blind:
            return True
        self._is_blind, self._look = False, None
        if not self._reader.are_unmoved:
            self._recalls = False
            self._confidence.learn(unchanged=False, was_surprised=True)
            return False
        return True

    def look_on(self) -> bool:
        """Do a part of what `confirm` does, for a millisecond at most; return whether all is done, and right."""
        if self._recalls:
            if not self._reader.can_be_recalled:
                return False
            look = self._later_look()
            return look.go_on() and look.is_over and self._shards.are_held
        return True

    def confirm(self) -> bool:
        """Return whether what `manifest` and `shards` have told last was right; asked once after `recall`."""
        if not self._recalls:
            return True
        self._recalls = False
        holds = self._later_look().finish() if self._reader.can_be_recalled else self._reader.still_holds
        is_right = holds and self._shards.are_held
        self._confidence.learn(is_right, was_surprised=not is_right)
        return is_right

    def _later_look(self) -> Look:
        if self._look is None:
            self._look = self._reader.look(moved=self._is_blind)
        return self._look

    def manifest(self) -> Manifest:
        """Read the module anew; iteration and `resident` then speak of the same tensors.

        Raises:
            ConfigError: the module holds something that cannot be sent, two weights get one name, or FSDP2 is in the
                middle of a forward pass; it is named.
        """
        if self._is_blind:
            if self._reader.first_is_unmoved:  # whoever has moved all of them between two updates is seen to have
                return self._manifest
            self._recalls = self._is_blind = False
        if self._recalls:
            read = self._reader.recall()
        else:
            read = self._reader.read()
            self._confidence.learn(read is self._read)
        if read is not self._read:
            names = {name: self._sent_as(name) for name in (*read, *self._reader.aliases)}
            self._weights = self._renamed(read, names)
            computed = {names[name] for name in self._reader.computed}
            self._resident = {
                name: tensor
                for name, tensor in self._weights.items()
                if name not in computed and not is_sharded(tensor) and not is_lazy(tensor)
            }
            manifest = Manifest(
                (ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in self._weights.items()),
                self._renamed_aliases(self._reader.aliases, names),
            )
            if manifest != self._manifest:
                self._manifest = manifest
            self._collective = any(map(is_sharded, self._weights.values()))
            self._read = read
        return self._manifest

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, full_tensor(tensor)) for name, tensor in self._weights.items())

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, full_tensor(tensor)) for name, tensor in self._weights.items() if name in names)

    def cast(
        self, dtypes: Mapping[str, torch.dtype], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate; a sharded tensor is cast before it is gathered, which then moves fewer bytes."""
        chosen = self._weights.items()
        return ((name, full_tensor(it, dtypes.get(name))) for name, it in chosen if names is None or name in names)

    def resident(self) -> Mapping[str, torch.Tensor]:
        return self._resident

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """Return the local tensors of ``DTensor`` weights, and the resident ones, which rank 0 sends.

        Placements may be ``Shard``, ``Replicate`` and what FSDP2 makes of a tensor-parallel weight, on any mesh. Sums
        that are still to be made (``Partial``), tensors of other types and computed ones are absent.
        """
        return self._shards.of(self._weights, self._resident, self._recalls)

    @property
    def device(self) -> str:
        first = next(iter(self._weights.values()), None)
        return "cpu" if first is None else str(first.device)

    @property
    def collective(self) -> bool:
        return self._collective

    @property
    def reuses_memory(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"ModuleSource({type(self.module).__name__})"

    def _sent_as(self, name: str) -> str | None:
        new = name if self._rename is None else self._rename(name)
        if new is not None and (not isinstance(new, str) or not new):
            raise ConfigError(f"rename must give a name or None, and gave {new!r} for {name!r}.")
        return new

    def _renamed(
        self, weights: Mapping[str, torch.Tensor], names: Mapping[str, str | None]
    ) -> Mapping[str, torch.Tensor]:
        if self._rename is None:
            return weights
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in weights.items():
            new = names[name]
            if new in renamed:
                raise ConfigError(f"rename gives several parameters the name {new!r}; each needs one of its own.")
            if new is not None:
                renamed[new] = tensor
        return renamed

    def _renamed_aliases(self, aliases: Mapping[str, str], names: Mapping[str, str | None]) -> dict[str, str]:
        renamed: dict[str, str] = {}
        for alias, name in aliases.items():
            new, first = names[alias], names[name]
            if new is None or new == first:
                continue
            if new in self._weights or renamed.get(new, first) != first:
                raise ConfigError(f"rename gives several parameters the name {new!r}; each needs one of its own.")
            if first is None:
                raise ConfigError(f"rename drops {name!r}, but not {alias!r}, which is tied to it; drop both or none.")
            renamed[new] = first
        return renamed


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of several shards, such as a ``DTensor``."""
    return hasattr(type(tensor), "full_tensor")


def full_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return all of a tensor, gathered from its shards; in ``dtype`` if one is named."""
    with torch.no_grad():
        full: Any = tensor
        if is_sharded(tensor):
            is_sum = any(placement.is_partial() for placement in getattr(tensor, "placements", ()))
            full = (tensor if dtype is None or is_sum else tensor.to(dtype)).full_tensor()  # type: ignore[attr-defined]
        found: torch.Tensor = full.detach().resolve_conj().resolve_neg()
        return found if dtype is None else found.to(dtype)
