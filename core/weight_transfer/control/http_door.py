"""How a request comes in: by its guard, and with a body that is not too much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from weight_transfer.control.guard import Guard, Refusal
from weight_transfer.control.http_connections import connection_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from weight_transfer.control.limits import HttpLimits


class Door:
    """Lets requests in, and reads their bodies.

    Args:
        guard: says who may call.
        limits: of bodies.

    Attributes:
        limits: the same.
    """

    def __init__(self, guard: Guard, limits: HttpLimits) -> None:
        self._guard = guard
        self.limits = limits

    def admit(self, request: Request) -> None:
        """Raise `Refusal` unless the request may be answered."""
        connection = connection_of(request.scope)
        if connection is not None and connection.lacks_certificate:
            raise Refusal(401, "This worker asks trainers for a certificate; set tls_cert and tls_key.")
        self._guard.check(request)
        if connection is not None:
            connection.may_call = True

    async def body_of(self, request: Request) -> bytes:
        """Return a request's body.

        Raises:
            Refusal: it is too long, or does not come.
            ClientDisconnect: whoever sends it has gone away.
        """
        most, seconds = self.limits.body_bytes, self.limits.body_seconds
        announced = request.headers.get("content-length", "0")
        body = bytearray()
        try:
            with anyio.fail_after(seconds):
                if int(announced) <= most:
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > most:
                            break
                    else:
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"The request's body did not come within {seconds:g} s.") from None
        raise Refusal(413, f"A request's body has at most {most} bytes here; a server takes more by its limits.")
