"""What may name a version of the weights."""

from __future__ import annotations

import operator
import re
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


def is_same(version: Version, other: Version, *, as_text: bool) -> bool:
    """Return whether two versions are one.

    Args:
        version: one.
        other: the other.
        as_text: whether one of them has come through a channel that turns numbers into text: then ``"7"`` is 7. Else it
            is another name.
    """
    return repr(version) == repr(other) or (as_text and str(version) == str(other))


def following(served: list[Version]) -> Version:
    """Return the number that comes after all versions that workers serve; 0 if they serve none.

    The text of a whole number, such as ``"7"``, counts as that number: servers that keep their versions as text, as
    vLLM does, say so of a 7 that they were given. What follows is a number again, 8, also if all of them are text:
    there may be workers that keep numbers beside them, or come later, and a channel that wants text turns it into text
    by itself (`ControlChannel`). Any other spelling (``"07"``, ``"7.0"``, ``"step 7"``) is a name.

    Raises:
        ConfigError: they serve a name, which no number follows.
    """
    counted = [_number(version) for version in served]
    named = next((version for version, number in zip(served, counted, strict=True) if number is None), None)
    if named is not None:
        raise ConfigError(f"The last version is called {named!r}; name the new one: send(model, version=...).")
    return max((number for number in counted if number is not None), default=-1) + 1


_NUMBER = re.compile(r"(?:0|-?[1-9][0-9]{0,17})")


def _number(version: Version) -> int | None:
    if isinstance(version, str):
        return int(version) if _NUMBER.fullmatch(version) else None
    return int(version)
