"""What may name a version of the weights."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from weight_transfer.values.events import Version


def as_version(value: Any) -> Version:
    """Return a version as a plain number or text; integers of numpy and torch are taken by their value.

    Raises:
        ConfigError: it is neither a whole number nor text, or empty.
    """
    if isinstance(value, str) and value:
        return str(value)
    if not isinstance(value, (bool, str)):
        try:
            return operator.index(value)
        except (RuntimeError, TypeError, ValueError):
            pass  # the sentence below says it
    raise ConfigError(f"A version is a whole number, such as the trainer's step, or a name; got {value!r}.")


def following(served: list[Version]) -> Version:
    """Return the number that comes after all versions that workers serve; 0 if they serve none.

    Raises:
        ConfigError: they serve a name, which no number follows.
    """
    named = next((version for version in served if isinstance(version, str)), None)
    if named is not None:
        raise ConfigError(f"The last version is called {named!r}; name the new one: send(model, version=...).")
    return max((int(version) for version in served), default=-1) + 1
