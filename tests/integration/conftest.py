"""Processes of the integration tests."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from support.actors import Actor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.actors import Spawn


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start actors that end with the test."""
    with ExitStack() as stack:

        def start(role: str, **spec: Any) -> Actor:
            actor = Actor(role, **spec)
            stack.callback(actor.stop)
            return actor.ready()

        yield start
