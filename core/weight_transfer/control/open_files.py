"""How many connections a process can bear."""

from __future__ import annotations

import resource


def at_most_half_of_files(count: int) -> int:
    """Return ``count``, or half as many as this process may have files open, whichever is less."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return count if soft == resource.RLIM_INFINITY else min(count, max(1, soft // 2))
