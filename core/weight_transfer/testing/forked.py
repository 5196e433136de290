"""A child that a process forks, with the model as it stands."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.testing.actors import Actor, Stage, eventually
from weight_transfer.testing.models import hashes, randomise

if TYPE_CHECKING:
    from torch import nn


class ForkedChild(Actor):
    """Knows the commands ``hashes`` and ``randomise``, for the model that it has inherited."""

    def __init__(self, model: nn.Module) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which the child uses none
            pid = os.fork()
        if not pid:
            try:
                _close_all_but(theirs.fileno())
                faulthandler.enable(2)  # as the parent may have it elsewhere
                Stage(theirs).serve({"hashes": lambda: hashes(model), "randomise": lambda seed: randomise(model, seed)})
            except BaseException:  # noqa: BLE001  (shown)
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        theirs.close()
        self._body = _Process(pid)


class _Process:
    """What an actor asks of its process."""

    name = "the forked child"

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exitcode: int | None = None

    def is_alive(self) -> bool:
        if self.exitcode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.exitcode = os.waitstatus_to_exitcode(status) if ended else None
        return self.exitcode is None

    def join(self, timeout: float) -> None:
        eventually(lambda: not self.is_alive(), timeout)


def _close_all_but(kept: int) -> None:
    """Close what was inherited: with the test's own ends of pipes open here, no actor would ever see them closed."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != kept:
            with suppress(OSError):  # that of the listing itself
                os.close(fd)


class Family:
    """The forked children of an actor, by name.

    Args:
        model: that they inherit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._children: dict[str, ForkedChild] = {}

    def fork(self, child: str) -> None:
        """Fork a child."""
        self._children[child] = ForkedChild(self._model)

    def ask(self, child: str, order: str, **arguments: Any) -> Any:
        """Have a child do something."""
        return self._children[child].ask(order, **arguments)

    def end(self) -> None:
        """End them all."""
        while self._children:
            self._children.popitem()[1].stop()
