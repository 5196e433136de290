"""Looks at a module in stages, so that bytes move meanwhile; and whether one may do without looking first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from weight_transfer.model.dict_versions import DictVersions

if TYPE_CHECKING:
    from torch import nn

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_TABLES = ("_modules", "_parameters", "_buffers", *_HOOKS)
_FIRST, _MOST = 16, 512  # weights of the first stage, after which bytes may move, and of later ones
_GROWTH = 1.5  # from one to the next: what of weights is looked at takes about as long as the bytes of as many on a GPU
_REMEMBERED = 4096  # tuples of names, which are kept
_CARE = 8
"""How many times as many looks have to find nothing new after one that was relied on has found something."""


class Look:
    """A look at the weights of a module, stage by stage; it ends at the first one that is not as it was.

    Args:
        stages: look at one each, in the order in which a walk comes to the module's parts.
    """

    def __init__(self, stages: Sequence[Callable[[], bool]]) -> None:
        self._stages = stages
        self._seen = 0
        self.is_right = True
        """Whether all that was looked at is as it was."""

    @property
    def is_over(self) -> bool:
        return not self.is_right or self._seen == len(self._stages)

    def reach(self, stage: int) -> bool:
        """Look at everything up to a stage, counted from 0; return whether it is as it was."""
        while self._seen <= stage and not self.is_over:
            self.is_right = self._stages[self._seen]()
            self._seen += 1
        return self.is_right

    def go_on(self) -> bool:
        """Look at one more stage."""
        return self.reach(self._seen)

    def finish(self) -> bool:
        """Look at all that is left."""
        return self.reach(len(self._stages) - 1)


class Stages:
    """The stages of a look at which weights are reached.

    Args:
        stages: by name.
    """

    def __init__(self, stages: Mapping[str, int]) -> None:
        self._stages = stages
        self._known: dict[int, tuple[tuple[str, ...], int]] = {}

    def of(self, names: Iterable[str]) -> int:
        """Return the last one of several weights; it costs nothing to ask it of the same tuple again and again."""
        if not isinstance(names, tuple):
            return self._last(names)
        known = self._known.get(id(names))
        if known is None:
            if len(self._known) == _REMEMBERED:  # by somebody who makes new ones each time
                self._known.clear()
            self._known[id(names)] = known = names, self._last(names)
        return known[1]

    def _last(self, names: Iterable[str]) -> int:
        return max(map(self._stages.__getitem__, names), default=0)


class Confidence:
    """Whether a module is likely to have what it had: after two looks that found so, and more after a surprise."""

    def __init__(self) -> None:
        self._seen = 0
        self._needed = 2

    @property
    def suffices(self) -> bool:
        """Whether that has been seen often enough."""
        return self._seen >= self._needed

    def learn(self, unchanged: bool, was_surprised: bool = False) -> None:
        """Take in what a look has found, and whether one would have relied on something else."""
        self._seen = self._seen + 1 if unchanged else 0
        if was_surprised:
            self._needed *= _CARE


class Tables:
    """What the tables of some modules hold: their children, parameters, buffers, and hooks of ``state_dict()``.

    They are many, and in nobody's cache: no object is made for any, and what they hold is visited only if something was
    written there; whether a hook is where none was, only if any has been registered in this process. That a module was
    given another ``__dict__`` is not noticed: nothing in torch gives it one.

    Args:
        modules: one after the other as a walk comes to them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        owners = list(map(vars, modules))
        self._owners = [owner for owner in owners for _ in _TABLES]
        self._tables: list[Any] = list(map(dict.get, self._owners, cycle(_TABLES)))
        named = list(zip(cycle(_TABLES), self._tables, strict=False))
        self._registered = RemovableHandle.next_id
        empty = [table for name, table in named if not table and name not in _HOOKS]
        self._unhooked = [table for name, table in named if not table and name in _HOOKS]
        self._filled = [table for table in self._tables if table]
        self._versions = DictVersions([*owners, *self._filled], empty)
        self._counts = list(map(len, self._filled))
        self._keys = list(chain.from_iterable(self._filled))
        self._values = list(_values_of(self._filled))
        self._transient = [
            module._non_persistent_buffers_set  # noqa: SLF001
            for module in modules
            if module._buffers  # noqa: SLF001
        ]
        self._were_transient = list(map(set, self._transient))

    @staticmethod
    def can_be_compared(modules: Sequence[nn.Module]) -> bool:
        """Whether these modules have tables; a script's have none."""
        return all(isinstance(vars(module).get(name), dict) for module in modules for name in _TABLES)

    @property
    def hold(self) -> bool:
        """Whether they hold what they held."""
        if self._transient != self._were_transient:
            return False
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if any(self._unhooked):
                return False
            self._registered = registered
        return self._versions.unchanged_or(self._hold_the_same)

    def _hold_the_same(self) -> bool:
        return (
            all(map(operator.is_, map(dict.get, self._owners, cycle(_TABLES)), self._tables))
            and list(map(len, self._filled)) == self._counts
            and list(chain.from_iterable(self._filled)) == self._keys
            and all(map(operator.is_, _values_of(self._filled), self._values))
        )


def staged(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Cut modules into stages by the parameters and buffers that they have of their own: few, then more and more."""
    stage: list[nn.Module] = []
    count, size = 0, float(_FIRST)
    for module in modules:
        stage.append(module)
        count += len(module._parameters) + len(module._buffers)  # noqa: SLF001  (seen, not touched)
        if count >= size:
            yield stage
            stage, count, size = [], 0, min(_GROWTH * size, _MOST)
    if stage:
        yield stage


def _values_of(tables: Sequence[dict[Any, Any]]) -> Iterator[object]:
    return chain.from_iterable(map(dict.values, tables))
