"""Gloo cannot abort an operation, but one whose connection breaks ends at once: its connections are found and broken.

Each member of a gloo group listens at an address that gloo publishes in the group's store. So a connection of this
process belongs to the group if one of its ends is such an address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Set
from typing import Any

End = tuple[str, int]
"""IP address and port."""

_ADDRESS = 18  # where a sockaddr begins in what gloo publishes of a member, since torch 2.0
_FAMILY_AND_PORT = struct.Struct("=H2s")
_IPV4 = slice(_ADDRESS + 4, _ADDRESS + 8)
_IPV6 = slice(_ADDRESS + 8, _ADDRESS + 24)


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
    for name in os.listdir("/proc/self/fd") if ends else ():
        with contextlib.suppress(OSError):  # it was closed meanwhile, or is not connected
            fd = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            with socket.socket(fileno=fd) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and (
                    _named(connection.getpeername()) in ends or _named(connection.getsockname()) in ends
                ):
                    connection.shutdown(socket.SHUT_RD)


def _named(address: Any) -> End:
    return _end(address[0], address[1])


def _end(host: str, port: int) -> End:
    ip = ipaddress.ip_address(host.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip), port
