"""A control channel over HTTP, with the route names of vLLM's server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import httpx
except ImportError as error:  # pragma: no cover
    raise ImportError("A worker's URL needs HTTP support: pip install 'weight-transfer[http]'") from error

from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError, error_from_dict

if TYPE_CHECKING:
    from weight_transfer.events import Version

_CONNECT_TIMEOUT = 5.0  # seconds
_MARGIN = 2.0  # seconds that an answer may take beyond the timeout that the request itself carries


class HttpChannel:
    """Talks to `serve`, or to any server with the same routes.

    Args:
        address: base URL, such as ``http://127.0.0.1:8001``.
        token: bearer token, if the server demands one.
        timeout: seconds that a request without a timeout of its own may take.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 300.0) -> None:
        self.address = address.rstrip("/")
        self._timeout = timeout
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=self.address, headers=headers, timeout=None, trust_env=False)
        for name in ("Accept", "Accept-Encoding", "User-Agent"):  # control traffic is counted in bytes
            self._client.headers.pop(name, None)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        answer: dict[str, Any] | None = self._post(
            "init_weight_transfer_engine", {"init_info": init_info}, init_info.get("timeout")
        )
        return answer

    def start_weight_update(self) -> None:
        self._post("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        report: dict[str, Any] | None = self._post(
            "update_weights", {"update_info": update_info}, update_info.get("timeout")
        )
        return report

    def finish_weight_update(self, weight_version: Version | None = None) -> None:
        self._post("finish_weight_update", {"weight_version": weight_version})

    def abort_weight_update(self, reason: str = "") -> None:
        self._post("abort_weight_update", {"reason": reason})

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._request("GET", "status", None, None)
        return status

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> HttpChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, route: str, body: dict[str, Any], timeout: float | None = None) -> Any:
        return self._request("POST", route, body, timeout)

    def _request(self, method: str, route: str, body: dict[str, Any] | None, timeout: float | None) -> Any:
        seconds = (timeout or self._timeout) + _MARGIN
        limits = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT))
        where = {"peer": self.address, "phase": route.partition("_")[0]}
        try:
            response = self._client.request(method, f"/{route}", json=body, timeout=limits)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            message = (
                f"{self.address!r} is not a worker's URL such as 'http://127.0.0.1:8001', or the token is malformed."
            )
            raise ConfigError(message, cause=_text(error)) from error
        except httpx.ConnectTimeout as error:
            raise PeerLostError("The worker cannot be reached.", cause=_text(error), **where) from error
        except httpx.TimeoutException as error:
            message = f"The worker did not answer /{route} within {seconds:.1f} s."
            raise TransferTimeoutError(message, cause=_text(error), **where) from error
        except httpx.TransportError as error:
            raise PeerLostError("The worker cannot be reached, or went away.", cause=_text(error), **where) from error
        return self._answer(response, route, where)

    def _answer(self, response: httpx.Response, route: str, where: dict[str, str]) -> Any:
        try:
            answer = response.json() if response.content else None
        except ValueError as error:
            raise HandshakeError(
                f"/{route} answered with something else than JSON; is this the worker's URL?", **where
            ) from error
        if response.is_success:
            return answer
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            raise error_from_dict(answer["error"])
        raise HandshakeError(
            f"/{route} answered with HTTP status {response.status_code}; is this the worker's URL?", **where
        )


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
