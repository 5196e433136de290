"""The weights of a module by name, read again at each update without walking it again."""

from __future__ import annotations

import operator
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

from torch._C._dynamo.guards import dict_version  # another one after each write, as torch's guards compare it
from torch.utils.hooks import RemovableHandle

from weight_transfer.errors import ConfigError
from weight_transfer.model.overlap import overlapping
from weight_transfer.model.resharding import Resharding
from weight_transfer.model.state import State, copies_of, is_lazy, local_part, state_of
from weight_transfer.model.whereabouts import Whereabouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import nn

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_TABLES = ("_modules", "_parameters", "_buffers", *_HOOKS)


class ModuleWeights:
    """The parameters and persistent buffers of a module, and what else ``state_dict()`` has, each memory once.

    Walking a model with ten thousand parameters takes longer than many a transfer of them, so the walk is kept: it is
    repeated only if a module, parameter, buffer or hook was added, removed or replaced, or has another shape, dtype,
    place or persistence. Modules that FSDP2 has unsharded get their shards back before they are read: the walk has seen
    these, so that whatever else a module holds is noticed.

    Args:
        module: whose weights.
        ignore: glob patterns of names to leave out.
    """

    def __init__(self, module: nn.Module, ignore: Sequence[str] = ()) -> None:
        if isinstance(ignore, str):
            raise ConfigError(f'ignore: expected a list of patterns such as ["*_extra_state"], got {ignore!r}.')
        self._module = module
        self._ignore = ignore
        self._state = State({}, {}, (), frozenset())
        self._resharding: Resharding | None = None
        self._tables: list[dict[str, Any]] = []
        self._empty: list[dict[Any, Any]] = []
        self._unhooked: list[dict[Any, Any]] = []
        self._registered = 0
        self._filled: list[dict[Any, Any]] = []
        self._owners: list[dict[str, Any]] = []
        self._written: list[dict[Any, Any]] = []
        self._generations: list[int] = []
        self._counts: list[int] = []
        self._keys: list[Any] = []
        self._values: list[object] = []
        self._whereabouts = Whereabouts(())
        self._transient: list[set[str]] = []
        self._were_transient: list[set[str]] = []
        self.looks = 0
        """How often the module was looked at anew: whenever a weight was moved, among other reasons."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of the weights that `read` returned last, and whose they are."""
        return self._state.aliases

    @property
    def computed(self) -> frozenset[str]:
        """Names of the weights that are no tensors of the module's own, but were made for `read`."""
        return self._state.computed

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the weights; the same object as long as all of them are the same, and lie where and as they lay.

        So whoever has worked out something of their addresses need not look at them again. Of a tensor that wraps
        others, such as a ``DTensor``, the memory is not looked at.

        Raises:
            ConfigError: the module holds something that cannot be read or sent, or is in the middle of a forward pass
                with FSDP2; the sentence names it.
        """
        if not (self._unchanged() or self._is_resharded()):
            self._walk()
        elif not self._whereabouts.unchanged:
            self._look()
        return self._state.weights

    def recall(self) -> Mapping[str, torch.Tensor]:
        """Return what `read` has returned last if that still lies where and as it lay, else read anew.

        Whether the module still has these tensors is not looked at, which takes most of the time: that `still_holds`.
        """
        resharding = self._resharding
        if self._state.computed or not self._tables or (resharding is not None and not resharding.is_brief):
            return self.read()
        if resharding is not None:
            resharding.reshard()
        return self._state.weights if self._whereabouts.unchanged else self.read()

    @property
    def still_holds(self) -> bool:
        """Whether the module has the very tensors that were read last, under the same names."""
        return self._unchanged() or self._is_resharded()

    @property
    def are_unchanged(self) -> bool:
        """Whether `read` would return what it has returned last, as far as a look tells that changes nothing."""
        return self._unchanged() and self._whereabouts.unchanged

    def require_writable(self) -> None:
        """Refuse what cannot be written tensor by tensor, in place.

        Raises:
            ConfigError: a weight shares memory with another one, or is only computed; it is named.
        """
        own = {name: local_part(tensor) for name, tensor in self._state.weights.items()}
        for name, tensor in own.items():
            if is_lazy(tensor):
                raise ConfigError(
                    f"Weight {name!r} is a conjugate or negative view, whose bytes are not its values; make it a plain "
                    "tensor, with resolve_conj() or resolve_neg()."
                )
        shared = overlapping(own)
        if shared is not None:
            what = (
                "has several elements in one place" if shared[0] == shared[1] else f"shares memory with {shared[1]!r}"
            )
            raise ConfigError(f"Weight {shared[0]!r} {what}, so that one would overwrite the other; give it its own.")
        copies = copies_of(self._module, self._state.computed, self._ignore) if self._state.computed else []
        if copies:
            raise ConfigError(
                f"Weight {copies[0]!r} is computed when the model is saved, and cannot be written in place; give the "
                f'receiver a load_weights of your own, or leave it out on both sides: ignore=["{copies[0]}"].'
            )

    def _unchanged(self) -> bool:
        """Compare what the module's tables hold.

        They are many, and in nobody's cache: no object is made for any, and what they hold is visited only if something
        was written there; whether a hook is where none was, only if any has been registered in this process.
        """
        if not self._tables or self._state.computed or any(self._empty) or self._transient != self._were_transient:
            return False
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if any(self._unhooked):
                return False
            self._registered = registered
        if not all(self._written):  # so short a loop has the processor load many at a time, for the longer one below
            return False
        generations = list(map(dict_version, self._written))
        if generations != self._generations:
            if not self._holds_the_same():
                return False
            self._generations = generations
        return True

    def _holds_the_same(self) -> bool:
        return (
            all(map(operator.is_, map(dict.get, self._owners, cycle(_TABLES)), self._tables))
            and list(map(len, self._filled)) == self._counts
            and list(chain.from_iterable(self._filled)) == self._keys
            and all(map(operator.is_, _values_of(self._filled), self._values))
        )

    def _is_resharded(self) -> bool:
        """Bring back the shards that the walk has seen, and return whether nothing else had changed."""
        if self._resharding is None:
            return False
        self._resharding.reshard()
        return self._unchanged()

    def _walk(self) -> None:
        resharding = Resharding(self._module)
        resharding.reshard()
        self._resharding = resharding if resharding.needed else None
        self._look()  # first: it may call hooks that change what the tables hold
        modules = list(self._module.modules())
        owners = list(map(vars, modules))
        self._owners = [owner for owner in owners for _ in _TABLES]
        tables: list[Any] = list(map(dict.get, self._owners, cycle(_TABLES)))
        self._tables = tables if all(isinstance(table, dict) for table in tables) else []  # a script's are not
        named = list(zip(cycle(_TABLES), self._tables, strict=False))
        self._registered = RemovableHandle.next_id
        self._empty = [table for name, table in named if not table and name not in _HOOKS]
        self._unhooked = [table for name, table in named if not table and name in _HOOKS]
        self._filled = [table for table in self._tables if table]
        self._written = [*owners, *self._filled]
        self._generations = list(map(dict_version, self._written))
        self._counts = list(map(len, self._filled))
        self._keys = list(chain.from_iterable(self._filled))
        self._values = list(_values_of(self._filled))
        self._transient = [
            module._non_persistent_buffers_set  # noqa: SLF001
            for module in modules
            if self._tables and module._buffers  # noqa: SLF001
        ]
        self._were_transient = list(map(set, self._transient))

    def _look(self) -> None:
        """Read the module; keep the mapping if it says the same."""
        state = state_of(self._module, self._ignore)
        if not (state.is_same(self._state) and self._whereabouts.unchanged):
            self._state, self._whereabouts = state, Whereabouts((*state.weights.values(), *state.tied))
        self.looks += 1


def _values_of(tables: Sequence[dict[Any, Any]]) -> Iterator[object]:
    return chain.from_iterable(map(dict.values, tables))
