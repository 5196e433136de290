"""Who provides which backend: reads the metadata of installed distributions and imports no plugin.

The only module that touches ``importlib.metadata``. Below Python 3.12 it uses the backport, whose import replaces
the standard library's finder; the two must never be mixed.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BACKENDS_GROUP = "weight_transfer.backends"
CHANNELS_GROUP = "weight_transfer.channels"
OBSERVERS_GROUP = "weight_transfer.observers"


@attrs.frozen(kw_only=True, order=True)
class Provider:
    """Where something comes from; its text is ``weight-transfer-nccl 0.1.0 [weight_transfer_nccl.plugin]``."""

    distribution: str
    version: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} [{self.module}]"


@attrs.frozen(kw_only=True, order=True)
class BackendRef:
    """An entry point: the promise of a distribution to provide the backend ``name`` from module ``value``."""

    name: str
    value: str
    provider: Provider


def entry_points(group: str, name: str | None = None) -> tuple[BackendRef, ...]:
    """Return the entry points of ``group`` (and ``name``), sorted, identical ones collapsed.

    The same distribution can be seen twice, through two entries of ``sys.path`` or an editable install beside a wheel.
    """
    found = _installed(group, _whereabouts())
    return found if name is None else tuple(ref for ref in found if ref.name == name)


def backends() -> tuple[BackendRef, ...]:
    """Return every installed backend, from metadata alone. A name that two distributions claim is listed twice."""
    return entry_points(BACKENDS_GROUP)


@lru_cache(maxsize=16)
def _installed(group: str, _whereabouts: tuple[object, ...]) -> tuple[BackendRef, ...]:
    """Read the metadata of all distributions, which takes milliseconds, once for each state of ``sys.path``."""
    if sys.version_info >= (3, 12):
        from importlib.metadata import entry_points as installed
    else:
        from importlib_metadata import entry_points as installed
    return tuple(sorted({_ref(point) for point in installed(group=group)}))


def _whereabouts() -> tuple[object, ...]:
    """Return what differs after something was installed or removed: where is looked, and when it last changed."""
    return (*map(id, sys.meta_path), *((entry, _changed(entry)) for entry in sys.path))


def _changed(entry: str) -> int | None:
    try:
        return os.stat(entry or os.curdir).st_mtime_ns
    except OSError:  # there is no such folder
        return None


def _ref(point: EntryPoint) -> BackendRef:
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown distribution", "?")
    provider = Provider(distribution=distribution, version=version, module=point.value)
    return BackendRef(name=point.name, value=point.value, provider=provider)
