"""Whether dictionaries were written to, by the version that CPython gives one at each write.

A model of ten thousand weights has eighty thousand that matter. Torch's guards ask for the version of one at a time,
0.1 to 0.2 µs each: of all, as long as many a transfer takes. Where CPython keeps it is known, so many are read in one
call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._C._dynamo.guards import dict_version

_Table = dict[Any, Any]

_WORD = 8  # bytes
_VERSION = object.__basicsize__ + _WORD  # where ``ma_version_tag`` lies in a dictionary: after ``ma_used``
_RELEASES = ((3, 11), (3, 12))  # later ones write some attributes of objects without a new version, or have none
_FEW = 1024  # that are asked one by one before the call would have begun
_MEMORY = (ctypes.c_char * 2**62).from_address(_WORD)  # not at 0, which is no address; nothing is read of it here


class DictVersions:
    """The versions of some dictionaries.

    Args:
        dicts: they are kept, so that they stay where they are.
    """

    def __init__(self, dicts: Sequence[_Table]) -> None:
        self._dicts = dicts
        self._words = _words_of(dicts) if len(dicts) > _FEW and _can_be_read() else None
        self._seen = self._versions()

    def unchanged_or(self, hold_the_same: Callable[[], bool]) -> bool:
        """Whether nothing was written to any since; else whether they hold what they held, as a function tells.

        If they do, what was written so far need not be looked at again.
        """
        now = self._versions()  # first: what is written while the function looks counts
        if _equal(now, self._seen):
            return True
        if not hold_the_same():
            return False
        self._seen = now
        return True

    def _versions(self) -> torch.Tensor | list[int]:
        return list(map(dict_version, self._dicts)) if self._words is None else _read(self._words)


def _equal(one: torch.Tensor | list[int], other: torch.Tensor | list[int]) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other  # type: ignore[arg-type]


def _words_of(dicts: Sequence[_Table]) -> torch.Tensor:
    """Return which words of the memory hold the versions, as int64 of shape ``[dictionaries]``."""
    return torch.tensor([(id(each) + _VERSION) // _WORD - 1 for each in dicts], dtype=torch.int64, device="cpu")


def _read(words: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(_MEMORY, dtype=torch.int64).index_select(0, words)


@cache
def _can_be_read() -> bool:
    """Whether versions lie where they are expected, which is tried: each way to write gives another one, no reading."""
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in _RELEASES:
        return False
    probe: _Table = {"a": 0}
    words = _words_of([probe])
    writes: Sequence[Callable[[], object]] = (
        lambda: probe.__setitem__("a", 1),
        lambda: probe.__setitem__("b", 2),
        lambda: probe.update(b=3),
        lambda: probe.pop("b"),
        lambda: probe.setdefault("c", 4),
        lambda: probe.__delitem__("c"),
        probe.popitem,
        lambda: probe.update(d=5),
        probe.clear,
    )
    for write in writes:
        before = _read(words)
        list(probe.items())
        if not torch.equal(_read(words), before):
            return False
        write()
        if torch.equal(_read(words), before):
            return False
    return True
