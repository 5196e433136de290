"""An actor on a host of its own: a network namespace, with the ``/sys`` that belongs to it."""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.actors import Stage

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # sched.h
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 0x80000, 2  # sys/mount.h


def main(stage: Stage, plays: str, host: str, **spec: Any) -> None:
    """Enter the namespace ``host`` and run ``support.<plays>``."""
    _enter(host)
    import_module(f"support.{plays}").main(stage, **spec)


def enter_network(name: str) -> None:
    """Let the calling thread, and those that it starts from now on, see the network of a namespace."""
    with open(f"/run/netns/{name}") as namespace:
        _call("setns", namespace.fileno(), _CLONE_NEWNET)


def _enter(name: str) -> None:
    """What ``ip netns exec`` does: UCX looks for interfaces in ``/sys``, which shows those of who mounted it."""
    enter_network(name)
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_SLAVE | _MS_REC), None)
    _call("umount2", b"/sys", _MNT_DETACH)
    _call("mount", b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None)


def _call(function: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
