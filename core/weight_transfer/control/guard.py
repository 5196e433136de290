"""Who may use a worker's control channel over HTTP: refused requests get no further than here.

A web page that is open on the worker's machine can post to a server on loopback, and, by a DNS name that it controls,
even as if it were at home there. Its requests are known by what a browser does not let it change: the ``Host`` that it
called, its ``Origin``, and a content type that needs nobody's leave.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weight_transfer.errors import HandshakeError

if TYPE_CHECKING:
    from starlette.requests import Request


class Refusal(Exception):  # noqa: N818  (an answer, not a failure)
    """A request is refused.

    Attributes:
        status: HTTP status.
        error: the sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = HandshakeError(message)


class Guard:
    """Looks at every request before anything else does.

    Args:
        token: bearer token that a request must carry; None for none.
        hosts: names by which the server may be called. None: with a token any, since no page knows the token;
            without one those of loopback, and the address on which the request came in.
    """

    def __init__(self, token: str | None, hosts: Sequence[str] | None) -> None:
        self._token = token
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    def check(self, request: Request) -> None:
        """Raise `Refusal` unless the request may be answered."""
        host = request.headers.get("host", "")
        if not self._is_ours(host, request):
            raise Refusal(
                403,
                f"This worker is not called {host!r}; call it by a loopback address, set a token on both sides, or "
                "name its hosts: create_app(..., hosts=[...]).",
            )
        origin = request.headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            raise Refusal(403, f"A web page of {origin} may not use this worker's control channel.")
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and content_type != "application/json":
            raise Refusal(415, f"A request's content type must be application/json, got {content_type or 'none'}.")
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Refusal(401, "The bearer token is missing or wrong; set the same token on both sides.")

    def _is_ours(self, host: str, request: Request) -> bool:
        name = _name(host)
        if self._hosts is not None:
            return name in self._hosts or is_loopback(name)
        came_in_on = (request.scope.get("server") or ("",))[0]
        return self._token is not None or is_loopback(name) or (name != "" and name == came_in_on)

    def _is_own(self, origin: str, host: str) -> bool:
        at = origin.partition("://")[2].lower()
        return at != "" and (at == host.lower() or (self._hosts is not None and _name(at) in self._hosts))


def is_loopback(host: str) -> bool:
    """Return whether a name or address stays on this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Return the host without its port; IPv6 addresses stand in brackets."""
    host = host.lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
