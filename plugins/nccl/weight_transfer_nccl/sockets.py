"""Gloo cannot abort an operation, but one whose connection breaks ends at once: its connections are found and broken.

Each member of a gloo group listens at an address that gloo publishes in the group's store. So a connection of this
process belongs to the group if one of its ends is such an address.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator, Set
from typing import Any

logger = logging.getLogger(__name__)

End = tuple[str, int]
"""IP address and port."""

_ADDRESS = 18  # where a sockaddr begins in what gloo publishes of a member, since torch 2.0
_FAMILY_AND_PORT = struct.Struct("=H2s")
_IPV4 = slice(_ADDRESS + 4, _ADDRESS + 8)
_IPV6 = slice(_ADDRESS + 8, _ADDRESS + 24)

_SO_ATTACH_FILTER = 26  # socket(7)
_PROGRAM = struct.Struct("@HP")  # struct sock_fprog
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # struct sock_filter of linux/filter.h: return 0 bytes of what came


def published_end(record: bytes) -> End | None:
    """Return where a member listens, from its record in the store; None if the record looks otherwise."""
    if len(record) < _IPV6.stop:
        return None
    family, port = _FAMILY_AND_PORT.unpack_from(record, _ADDRESS)
    place = {int(socket.AF_INET): _IPV4, int(socket.AF_INET6): _IPV6}.get(family)
    return None if place is None else _end(ipaddress.ip_address(record[place]).compressed, int.from_bytes(port, "big"))


def break_connections(ends: Set[End]) -> None:
    """Let gloo read the end of every TCP connection of this process of which one end is among ``ends``.

    It then closes them. A write that fails instead would go unnoticed by the operation that waits for it.
    """
    for connection in _sockets() if ends else ():
        with connection, contextlib.suppress(OSError):  # it is not connected
            if _named(connection.getpeername()) in ends or _named(connection.getsockname()) in ends:
                connection.shutdown(socket.SHUT_RD)


def stop_hearing(end: End) -> None:
    """Let the listener of this process at ``end`` drop whatever comes, once nobody is expected any more.

    Gloo goes on to accept whoever connects, and keeps the connection. Closing a listener that gloo polls would keep it
    busy; a socket filter lets nothing get that far. Those that are connected already are left alone.
    """
    instructions = ctypes.create_string_buffer(_DROP_ALL)
    program = _PROGRAM.pack(1, ctypes.addressof(instructions))
    for listener in _sockets():
        with listener:
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and _named(listener.getsockname()) == end:
                try:
                    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
                except OSError as error:  # some sandboxes have no socket filters
                    logger.warning("gloo goes on to accept strangers on %s port %d: %s", *end, error)


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each TCP socket of this process, to be closed."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            fd = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            found = socket.socket(fileno=fd)
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                yield found
            else:
                found.close()


def _named(address: Any) -> End:
    return _end(address[0], address[1])


def _end(host: str, port: int) -> End:
    ip = ipaddress.ip_address(host.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip), port
