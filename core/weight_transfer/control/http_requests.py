"""Requests of their own to a worker's server, and what their failures mean."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

import attrs

try:
    import httpx
except ImportError as error:  # pragma: no cover
    raise ImportError("A worker's URL needs HTTP support: pip install 'weight-transfer[http]'") from error

from weight_transfer.control.line import CONTENT_TYPE
from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError, extract

OPTIONAL = ("status", "weight_needs", "expect_weight_update", "decide_weight_update", "abort_weight_update")
"""Routes that a server need not have."""


@attrs.frozen
class Answer:
    """What came back: the HTTP status, and the JSON of the body; None for an empty one."""

    status: int
    body: Any


class Requests:
    """The connections that carry one request at a time; to be used on the event loop.

    Args:
        address: base URL.
        headers: of each request.
        connect_timeout: seconds that connecting may take.
        tls: for an ``https://`` address; None for another.
    """

    def __init__(
        self, address: str, headers: dict[str, str], connect_timeout: float, tls: ssl.SSLContext | None
    ) -> None:
        self._address = address
        self._headers = headers
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._client: httpx.AsyncClient | None = None

    async def ask(self, route: str, body: bytes, seconds: float, where: dict[str, Any]) -> Answer:
        """Make a request.

        Args:
            route: without a slash.
            body: JSON; a request for the status has none.
            seconds: that it may take.
            where: fields of errors.

        Raises:
            ConfigError: the URL is malformed.
            PeerLostError: the worker cannot be reached, or went away.
            TransferTimeoutError: it did not answer.
            HandshakeError: it answered with something else than JSON, or in something else than HTTPS.
        """
        limits = httpx.Timeout(seconds, connect=min(seconds, self._connect_timeout))
        what: dict[str, Any] = {"method": "GET"}
        if route != "status":
            what = {"method": "POST", "content": body, "headers": {"Content-Type": CONTENT_TYPE}}
        try:
            response = await self._open().request(url=f"{self._address}/{route}", timeout=limits, **what)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise ConfigError(f"A request to {self._address} is malformed.", cause=_text(error)) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise unconnected(error, where) from error
        except httpx.TimeoutException as error:
            message = f"The worker did not answer /{route} within {seconds:.1f} s."
            raise TransferTimeoutError(message, cause=_text(error), **where) from error
        except httpx.TransportError as error:
            message = "The worker cannot be reached, or went away."
            if self._tls is not None:
                message = "The worker cannot be reached, or went away; it may not trust this trainer's certificate."
            raise unconnected(error, where, message) from error
        if route in OPTIONAL and response.status_code in (404, 405):
            return Answer(response.status_code, None)
        try:
            return Answer(response.status_code, response.json() if response.content else None)
        except ValueError as error:
            message = f"/{route} answered with something else than JSON; is this the worker's URL?"
            raise extract(response.text) or HandshakeError(message, **where) from error

    async def close(self) -> None:
        """Close the connections; the next request opens one."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                headers=self._headers,
                timeout=None,
                trust_env=False,
                verify=self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # which trusts nobody
            )
            for name in ("Accept", "Accept-Encoding", "User-Agent"):  # control traffic is counted in bytes
                self._client.headers.pop(name, None)
        return self._client


def parsed(address: str) -> httpx.URL:
    """Return a worker's URL.

    Raises:
        ConfigError: it is none.
    """
    try:
        url = httpx.URL(address)
        if url.scheme in ("http", "https") and url.host and (url.port or 0) < 2**16:
            return url
        cause = None
    except httpx.InvalidURL as error:
        cause = _text(error)
    raise ConfigError(f"{address!r} is not a worker's URL such as 'http://127.0.0.1:8001'.", cause=cause)


def unconnected(
    error: Exception, where: dict[str, Any], message: str = "The worker cannot be reached."
) -> HandshakeError | PeerLostError:
    """Return the error of a connection that failed: what asking again cannot mend is told from the rest."""
    cause = _text(error)
    for each in _causes(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            why = each.verify_message.rstrip(".")
            advice = "renew it, call the worker by a name that is in it, or set tls_ca to the authority that signed it"
            return HandshakeError(f"The worker's certificate is refused: {why}; {advice}.", cause=cause, **where)
        if isinstance(each, ssl.SSLError) and "ALERT" in (each.reason or ""):
            refused = "The worker refuses this trainer's certificate, or lacks one; set tls_cert and tls_key."
            return HandshakeError(refused, cause=cause, **where)
        if isinstance(each, ssl.SSLError) and not isinstance(each, ssl.SSLEOFError):
            plain = "The worker does not answer in HTTPS; is it an http:// address?"
            return HandshakeError(plain, cause=cause, **where)
        if isinstance(each, socket.gaierror) and each.errno != socket.EAI_AGAIN:
            unknown = "The worker cannot be reached: nobody knows its host's name; correct the URL."
            return PeerLostError(unknown, cause=cause, permanent=True, **where)
    return PeerLostError(message, cause=cause, **where)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
