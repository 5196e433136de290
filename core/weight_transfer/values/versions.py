"""What may name a version of the weights."""

from __future__ import annotations

import operator
import re
import reprlib
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError, RollbackError

if TYPE_CHECKING:
    from weight_transfer.values.events import Version

_LONGEST = 256  # characters of a name
_MAX = 2**63 - 1


def as_version(value: Any) -> Version:
    """Return a version as a plain number or text; integers of numpy and torch are taken by their value.

    Raises:
        ConfigError: it is neither a whole number of 64 bits nor a name, which has at most 256 printable characters.
    """
    huge = isinstance(value, int) and not -_MAX <= value <= _MAX
    given = f"a number of {value.bit_length()} bits" if huge else reprlib.repr(value)
    if isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable():
        return str(value)
    if not isinstance(value, (bool, str)):
        try:
            number = operator.index(value)
            if -_MAX <= number <= _MAX:
                return number
        except (RuntimeError, TypeError, ValueError):
            pass  # the sentence below says it
    raise ConfigError(
        "A version is a whole number of 64 bits, such as the trainer's step, or a name of at most "
        f"{_LONGEST} printable characters; got {given}."
    )


def is_same(version: Version, other: Version, *, as_text: bool) -> bool:
    """Return whether two versions are one.

    Args:
        version: one.
        other: the other.
        as_text: whether one of them has come through a channel that turns numbers into text: then ``"7"`` is 7. Else it
            is another name.
    """
    return repr(version) == repr(other) or (as_text and str(version) == str(other))


def require_forward(version: Version | None, last: Version | None, **where: Any) -> None:
    """Refuse a number that is lower than that of the last version; names have no order.

    Args:
        version: the new one; None if it has no name yet.
        last: the one that a worker has published last; None if it has published none.
        where: fields of the error.

    Raises:
        RollbackError: it is lower.
    """
    if isinstance(version, int) and isinstance(last, int) and version < last:
        raise RollbackError(
            f"Version {version} is older than {last}, which this worker has published; if it is to go back, say so: "
            "send(..., allow_rollback=True).",
            version=version,
            published=last,
            **where,
        )


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
