"""A control channel over HTTP, with the route names of vLLM's server."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any

try:
    import httpx
except ImportError as error:  # pragma: no cover
    raise ImportError("A worker's URL needs HTTP support: pip install 'weight-transfer[http]'") from error

from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    PeerLostError,
    TransferTimeoutError,
    error_from_dict,
    extract,
)

if TYPE_CHECKING:
    from weight_transfer.values.events import Version

_MARGIN = 2.0  # seconds that an answer may take beyond the timeout that the request itself carries


class HttpChannel:
    """Talks to `serve`, or to any server with the same routes.

    A server needs vLLM's four routes only. That it does not offer ``/status``, ``/weight_needs`` or
    ``/abort_weight_update`` (HTTP status 404 or 405) means that nobody can say how the workers are, that all weights go
    whole, and that a failed update ends when they are joined anew.

    Args:
        address: base URL, such as ``http://127.0.0.1:8001``.
        token: bearer token, if the server demands one.
        timeout: seconds that a request without a timeout of its own may take.
        status_timeout: seconds that ``/status`` may take; default is ``timeout``.
        connect_timeout: seconds that connecting may take.
        workers: workers behind the server, if it has no ``/status`` that tells.
        text_versions: whether the server wants versions as text, as vLLM's does; see `ControlChannel`.

    Attributes:
        carries_session: False once a server has been found to have no ``/status``: then its calls are vLLM's, which
            hand on no session.

    Raises:
        ConfigError: ``address`` is no URL.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout: float = 300.0,
        status_timeout: float | None = None,
        connect_timeout: float = 5.0,
        workers: int | None = None,
        text_versions: bool = False,
    ) -> None:
        self.address = address.rstrip("/")
        self.workers, self.text_versions = workers, text_versions
        self.carries_session = True
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._status_timeout = status_timeout
        _require_url(self.address)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=self.address, headers=headers, timeout=None, trust_env=False)
        for name in ("Accept", "Accept-Encoding", "User-Agent"):  # control traffic is counted in bytes
            self._client.headers.pop(name, None)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        answer: dict[str, Any] | None = self._post(
            "init_weight_transfer_engine", {"init_info": init_info}, init_info.get("timeout")
        )
        return answer

    def start_weight_update(self, session: str | None = None) -> None:
        self._post("start_weight_update", _with(session))

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        report: dict[str, Any] | None = self._post(
            "update_weights", {"update_info": update_info}, update_info.get("timeout")
        )
        return report

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Ask what the workers keep; None if the server has no such route, so that all weights have to go whole."""
        answer: dict[str, Any] | None = self._post(
            "weight_needs", {"request": request}, request.get("timeout"), optional=True
        )
        return answer

    def finish_weight_update(self, weight_version: Version | None = None, session: str | None = None) -> None:
        self._post("finish_weight_update", {"weight_version": weight_version} | _with(session))

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        """Have the update given up; nothing happens if the server has no such route."""
        self._post("abort_weight_update", {"reason": reason} | _with(session), optional=True)

    def status(self) -> dict[str, Any]:
        """Ask how the workers are; an empty dict if the server has no such route."""
        status: dict[str, Any] | None = self._request("GET", "status", None, self._status_timeout, optional=True)
        self.carries_session = status is not None
        return status or {}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> HttpChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, route: str, body: dict[str, Any], timeout: float | None = None, optional: bool = False) -> Any:
        return self._request("POST", route, body, timeout, optional)

    def _request(
        self, method: str, route: str, body: dict[str, Any] | None, timeout: float | None, optional: bool = False
    ) -> Any:
        seconds = (timeout or self._timeout) + _MARGIN
        limits = httpx.Timeout(seconds, connect=min(seconds, self._connect_timeout))
        where: dict[str, Any] = {"peer": self.address, "phase": route.partition("_")[0]}
        try:
            response = self._client.request(method, f"/{route}", json=body, timeout=limits)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise ConfigError(f"A request to {self.address} is malformed.", cause=_text(error)) from error
        except httpx.ConnectError as error:
            raise _unconnected(error, where) from error
        except httpx.ConnectTimeout as error:
            raise PeerLostError("The worker cannot be reached.", cause=_text(error), **where) from error
        except httpx.TimeoutException as error:
            message = f"The worker did not answer /{route} within {seconds:.1f} s."
            raise TransferTimeoutError(message, cause=_text(error), **where) from error
        except httpx.TransportError as error:
            raise PeerLostError("The worker cannot be reached, or went away.", cause=_text(error), **where) from error
        if optional and response.status_code in (404, 405):
            return None
        return self._answer(response, route, where)

    def _answer(self, response: httpx.Response, route: str, where: dict[str, Any]) -> Any:
        try:
            answer = response.json() if response.content else None
        except ValueError as error:
            message = f"/{route} answered with something else than JSON; is this the worker's URL?"
            raise extract(response.text) or HandshakeError(message, **where) from error
        if response.is_success:
            return answer
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            told = error_from_dict(answer["error"])
            raise extract(told.message) or told
        raise extract(response.text) or HandshakeError(
            f"/{route} answered with HTTP status {response.status_code}; is this the worker's URL?", **where
        )


def _require_url(address: str) -> None:
    try:
        url = httpx.URL(address)
        if url.scheme in ("http", "https") and url.host and (url.port or 0) < 2**16:
            return
        cause = None
    except httpx.InvalidURL as error:
        cause = _text(error)
    raise ConfigError(f"{address!r} is not a worker's URL such as 'http://127.0.0.1:8001'.", cause=cause)


def _unconnected(error: httpx.ConnectError, where: dict[str, Any]) -> HandshakeError | PeerLostError:
    """Tell what asking again cannot mend from a worker that is not up yet."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        message = "The worker does not answer in HTTPS, or its certificate is not trusted; is it an http:// address?"
        return HandshakeError(message, cause=_text(error), **where)
    if any(isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN for cause in causes):
        message = "The worker cannot be reached: nobody knows its host's name; correct the URL."
        return PeerLostError(message, cause=_text(error), permanent=True, **where)
    return PeerLostError("The worker cannot be reached.", cause=_text(error), **where)


def _with(session: str | None) -> dict[str, str]:
    return {} if session is None else {"session": session}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
