"""A child that a process forks, with the model as it stands."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from weight_transfer.testing.actors import Actor, Stage
from weight_transfer.testing.models import hashes, randomise

if TYPE_CHECKING:
    from torch import nn


class ForkedChild(Actor):
    """Knows the commands ``hashes`` and ``randomise``, for the model that it has inherited."""

    def __init__(self, model: nn.Module) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which the child uses none
            self._id = os.fork()
        if not self._id:
            try:
                _close_all_but(theirs.fileno())
                Stage(theirs).serve({"hashes": lambda: hashes(model), "randomise": lambda seed: randomise(model, seed)})
            finally:
                os._exit(0)
        theirs.close()
        self._body = self

    name = "the forked child"

    def stop(self) -> None:
        """End it, and wait for that."""
        self.hang_up()
        os.waitpid(self._id, 0)


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
