"""Whatever is compared takes turns: a busy machine disturbs all of it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turns(
    steps: Mapping[str, Callable[[], T]], rounds: int, tell: Callable[[str], None] = lambda _text: None
) -> dict[str, list[T]]:
    """Do everything again and again; return what came of it, by name and round.

    Each round begins with another step, for a busy machine favours whoever has rested. One more round comes first and
    does not count.

    Args:
        steps: what is done, by name.
        rounds: that count.
        tell: is told which round begins.
    """
    names = list(steps)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds + 1):
        tell(f"round {number} of {rounds}" if number else "a round that does not count")
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            result = steps[name]()
            if number:
                found[name].append(result)
    return found
