"""TCP connections that are half-open: what is sent is lost on the way, and neither end hears of that."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress

_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # of socket(7)
_TAKE_NOTHING = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # linux/filter.h: return 0
_FILTER = struct.pack("@HP", 1, ctypes.addressof(_TAKE_NOTHING))


def silence(silent: bool, but: Collection[int]) -> None:
    """Lose whatever comes in on the TCP connections of this process, as if a cable were cut; or end that.

    Who has sent something sends it again and again, and is heard once that is over.

    Args:
        silent: whether to begin.
        but: ports of connections that go on.
    """
    for connection in _connections():
        with connection, suppress(OSError):  # it is not connected
            if {connection.getsockname()[1], connection.getpeername()[1]}.isdisjoint(but):
                option = _ATTACH_FILTER if silent else _DETACH_FILTER
                connection.setsockopt(socket.SOL_SOCKET, option, _FILTER)


def _connections() -> Iterator[socket.socket]:
    """Yield a duplicate of each TCP socket of this process, to be closed."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it was closed meanwhile
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                found = socket.socket(fileno=os.dup(int(number)))
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    yield found
                else:
                    found.close()
