"""The weights of a module by name, read again at each update without walking it again."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.model.looking import Look, Tables, staged
from weight_transfer.model.overlap import overlapping
from weight_transfer.model.resharding import Resharding
from weight_transfer.model.state import State, copies_of, is_lazy, local_part, state_of
from weight_transfer.model.whereabouts import Whereabouts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn


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
        self._modules: list[list[nn.Module]] = []
        self._tables: list[Tables] = []
        self._whereabouts: list[Whereabouts] = []
        self._first = Whereabouts(())
        self._stages: dict[str, int] = {}
        self.looks = 0
        """How often the module was looked at anew: whenever a weight was moved, among other reasons."""

    def __reduce__(self) -> tuple[object, ...]:
        return ModuleWeights, (self._module, self._ignore)  # a copy has seen nothing yet of the module's copy

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
        if not self.still_holds:
            self._walk()
        elif not self.are_unmoved:
            self._look()
        return self._state.weights

    @property
    def known(self) -> Mapping[str, torch.Tensor]:
        """What `read` has returned last, of which a `look` speaks."""
        return self._state.weights

    @property
    def can_be_recalled(self) -> bool:
        """Whether `read` need not be asked again as long as a `look` finds that nothing has changed."""
        return bool(self._tables) and not self._state.computed and self._resharding is None

    @property
    def stages(self) -> Mapping[str, int]:
        """The stage of a `look` at which a weight is reached, by its name."""
        return self._stages

    def look(self, *, moved: bool = True) -> Look:
        """Return a look at what `read` has returned last, at nothing of it yet.

        Args:
            moved: whether to look at where the weights lie, beside whether the module still has these very tensors.
        """
        both = zip(self._tables, self._whereabouts, strict=True)
        return Look([partial(_is_as_it_was, tables, lie if moved else None) for tables, lie in both])

    def recall(self) -> Mapping[str, torch.Tensor]:
        """Return what `read` has returned last if that still lies where and as it lay, else read anew.

        Whether the module still has these tensors is not looked at, which takes most of the time: that `still_holds`.
        """
        resharding = self._resharding
        if self._state.computed or not self._tables or (resharding is not None and not resharding.is_brief):
            return self.read()
        if resharding is not None:
            resharding.reshard()
        return self._state.weights if self.are_unmoved else self.read()

    @property
    def still_holds(self) -> bool:
        """Whether the module has the very tensors that were read last, under the same names."""
        return self._holds() or self._is_resharded()

    @property
    def are_unmoved(self) -> bool:
        """Whether these lie where and as they lay."""
        return all(some.unchanged for some in self._whereabouts)

    @property
    def first_is_unmoved(self) -> bool:
        """Whether the first of them does."""
        return self._first.unchanged

    @property
    def are_unchanged(self) -> bool:
        """Whether `read` would return what it has returned last, as far as a look tells that changes nothing."""
        return self._holds() and self.are_unmoved

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

    def _holds(self) -> bool:
        return bool(self._tables) and not self._state.computed and all(tables.hold for tables in self._tables)

    def _is_resharded(self) -> bool:
        """Bring back the shards that the walk has seen, and return whether nothing else had changed."""
        if self._resharding is None:
            return False
        self._resharding.reshard()
        return self._holds()

    def _walk(self) -> None:
        resharding = Resharding(self._module)
        resharding.reshard()
        self._resharding = resharding if resharding.needed else None
        self._look()  # first: it may call hooks that change what the tables hold
        modules = list(self._module.modules())
        self._modules = list(staged(modules)) if Tables.can_be_compared(modules) else []
        self._tables = list(map(Tables, self._modules))
        self._place()

    def _look(self) -> None:
        """Read the module; keep the mapping if it says the same."""
        state = state_of(self._module, self._ignore)
        if not (state.is_same(self._state) and self.are_unmoved):
            self._state = state
            self._place()
        self.looks += 1

    def _place(self) -> None:
        """Take down where the weights lie, by the stages in which they are looked at: those of their modules."""
        owned = {
            id(tensor): stage
            for stage, modules in reversed(list(enumerate(self._modules)))
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())  # noqa: SLF001
        }
        last = max(len(self._modules) - 1, 0)
        together: list[list[torch.Tensor]] = [[] for _ in range(last + 1)]
        self._stages = {}
        for name, tensor in self._state.weights.items():
            self._stages[name] = stage = owned.get(id(tensor), last)
            together[stage].append(tensor)
        for tensor in self._state.tied:
            together[owned.get(id(tensor), last)].append(tensor)
        self._whereabouts = list(map(Whereabouts, together))
        self._first = Whereabouts(islice(self._state.weights.values(), 1))


def _is_as_it_was(tables: Tables, whereabouts: Whereabouts | None) -> bool:
    return tables.hold and (whereabouts is None or whereabouts.unchanged)
