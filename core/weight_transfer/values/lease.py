"""Whose the workers are: a trainer holds a lease of them, which only a newer one takes over."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Self

import attrs

_LONGEST = 64  # characters of a holder's name
_LARGEST = 2**62


@attrs.frozen(order=True)
class Lease:
    """A trainer's claim to its workers. Of two, the one with the higher number is newer, or the greater holder.

    Attributes:
        number: higher than that of every lease that the trainer has found on its workers.
        holder: the trainer, by a random name.
    """

    number: int = attrs.field(validator=[attrs.validators.ge(0), attrs.validators.lt(_LARGEST)])
    holder: str = attrs.field(validator=[attrs.validators.min_len(1), attrs.validators.max_len(_LONGEST)])

    @classmethod
    def after(cls, known: Iterable[Lease | None], holder: str) -> Self:
        """Return a lease that is newer than all that are ``known``.

        Its number is at least the time, in microseconds, since workers may know of none: they were started anew, or the
        trainer that stood still meanwhile had not come to join them. It stays the older one.
        """
        highest = max((lease.number for lease in known if lease is not None), default=0)
        return cls(max(highest + 1, time.time_ns() // 1000), holder)

    @classmethod
    def told(cls, status: dict[str, Any]) -> Self | None:
        """Return the lease that a worker's status tells; None if it tells none, or what is none."""
        data = status.get("lease")
        number, holder = (data.get("number"), data.get("holder")) if isinstance(data, dict) else (None, None)
        if type(number) is not int or not isinstance(holder, str):
            return None
        try:
            return cls(number, holder)
        except ValueError:
            return None

    def owns(self, session: str) -> bool:
        """Whether a session is one of the holder's; see `session_of`."""
        return session.startswith(session_of(self.holder, ""))


def session_of(holder: str, join: int | str) -> str:
    """Return the name of a trainer's session: each time that it joins is one."""
    return f"{holder}.{join}"
