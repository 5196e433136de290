"""How many connections a process can bear, and what it does when it has too many."""

from __future__ import annotations

import resource
import socket
import time

_PAUSE = 0.05  # seconds until the next attempt to take a connection, if that has failed


def at_most_half_of_files(count: int) -> int:
    """Return ``count``, or half as many as this process may have files open, whichever is less."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return count if soft == resource.RLIM_INFINITY else min(count, max(1, soft // 2))


def accepted(listener: socket.socket) -> socket.socket | None:
    """Return the next connection of a listener that does not block, itself non-blocking.

    None if whoever it was has gone again, or it cannot be taken, such as for want of files: then after a moment, so
    that a loop which asks again does not spin.
    """
    try:
        sock, _ = listener.accept()
    except BlockingIOError:
        return None
    except OSError:
        time.sleep(_PAUSE)
        return None
    sock.setblocking(False)
    return sock
