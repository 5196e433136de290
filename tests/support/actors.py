"""The kit's actors, with the roles of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weight_transfer.testing.actors import Actor as AnyActor
from weight_transfer.testing.actors import Stage

__all__ = ["Actor", "Spawn", "Stage"]


class Actor(AnyActor):
    """A process that runs ``main`` of ``support.<role>``."""

    def __init__(self, role: str, **spec: Any) -> None:
        super().__init__(f"support.{role}", **spec)


Spawn = Callable[..., Actor]
"""The fixture ``spawn``: takes an actor's arguments, and returns it once it is ready."""
