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

import numpy as np
from numpy.typing import NDArray
from torch._C._dynamo.guards import dict_version

_Table = dict[Any, Any]
_Words = NDArray[np.int64]

_WORD = 8  # bytes
_VERSION = object.__basicsize__ + _WORD  # where ``ma_version_tag`` lies in a dictionary: after ``ma_used``
_RELEASES = ((3, 11), (3, 12))  # later ones write some attributes of objects without a new version, or have none
_MANY = 1024  # fewer are asked one by one before the call would have begun
_MEMORY = memoryview((ctypes.c_char * 2**62).from_address(_WORD))  # not from 0, which is no address


class DictVersions:
    """The versions of some dictionaries.

    Args:
        dicts: they are kept, so that they stay where they are.
        empty: more of them, which hold nothing. Where torch is asked, only whether that is so is looked at, which costs
            less; and torch does not see, on some releases, that an empty one takes over what another one holds.
    """

    def __init__(self, dicts: Sequence[_Table], empty: Sequence[_Table] = ()) -> None:
        self._dicts, self._empty = dicts, empty
        every = [*dicts, *empty]
        self._words = _words_of(every) if len(every) >= _MANY and _can_be_read() else None
        self._seen = self._versions()

    def __reduce__(self) -> tuple[object, ...]:
        return DictVersions, (self._dicts, self._empty)  # those of a deep copy lie elsewhere

    def unchanged_or(self, hold_the_same: Callable[[], bool]) -> bool:
        """Whether nothing was written to any since; else whether they hold what they held, as a function tells.

        If they do, what was written so far need not be looked at again. One of the empty ones that holds something is
        a change, whatever the function tells.
        """
        if self._words is None and any(self._empty):
            return False
        now = self._versions()  # first: what is written while the function looks counts
        unchanged = now == self._seen if isinstance(now, list) else np.array_equal(now, self._seen)
        if unchanged:
            return True
        if any(self._empty) or not hold_the_same():
            return False
        self._seen = now
        return True

    def _versions(self) -> _Words | list[int]:
        return _read(self._words) if self._words is not None else list(map(dict_version, self._dicts))


def _words_of(dicts: Sequence[_Table]) -> _Words:
    """Return which words of the memory hold the versions, int64 ``[dictionaries]``."""
    return (np.fromiter(map(id, dicts), np.int64, len(dicts)) + _VERSION) // _WORD - 1


def _read(words: _Words) -> _Words:
    return np.frombuffer(_MEMORY, np.int64).take(words)


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
        lambda: probe.update({"d": 5}),
        probe.clear,
        lambda: probe.__ior__({"e": 6}),
    )
    for write in writes:
        before = _read(words)
        list(probe.items())
        if _read(words) != before:
            return False
        write()
        if _read(words) == before:
            return False
    return True
