"""vLLM's HTTP server."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import httpx

from weight_transfer.errors import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError
from weight_transfer_vllm.failures import failure

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_vllm.servers import PauseMode

_ONE_CALL_EACH = httpx.Limits(max_keepalive_connections=0)
"""vLLM closes a connection on which it has answered with an error, and idle ones: the next call could be lost there."""
_MARGIN = 2.0  # seconds that an answer may take beyond the deadline, which the workers keep themselves


class HttpServer:
    """A server that ``vllm serve`` has started with ``VLLM_SERVER_DEV_MODE=1``: it has these routes only then.

    vLLM 0.33 checks its API key below ``/v1``, ``/v2``, ``/inference`` and ``/cohere``, so not on these routes: whoever
    can reach them may replace the weights. Keep the port to yourself, or put a proxy in front that asks for the key.

    Args:
        url: base URL, such as ``http://127.0.0.1:8000``.
        api_key: bearer token for a proxy or middleware that asks for one.
        connect_timeout: seconds that connecting may take.

    Raises:
        ConfigError: ``url`` is none.
    """

    def __init__(self, url: str, api_key: str | None = None, connect_timeout: float = 5.0) -> None:
        self.address = url.rstrip("/")
        self._connect_timeout = connect_timeout
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            if httpx.URL(self.address).scheme not in ("http", "https") or not httpx.URL(self.address).host:
                raise ConfigError(f"{url!r} is not the URL of a vLLM server, such as 'http://127.0.0.1:8000'.")
            self._client = httpx.Client(
                base_url=self.address, headers=headers, timeout=None, trust_env=False, limits=_ONE_CALL_EACH
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigError("The vLLM server's URL or its API key is malformed.", cause=str(error)) from error

    def world_size(self, deadline: Deadline) -> int | None:
        answer = self._request("GET", "get_world_size", deadline)
        count = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            raise HandshakeError(f"/get_world_size answered {answer!r}; is this vLLM's URL?", peer=self.address)
        return count

    def init(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._request("POST", "init_weight_transfer_engine", deadline, {"init_info": info})

    def start(self, draft: bool, deadline: Deadline) -> None:
        self._request("POST", "start_draft_weight_update" if draft else "start_weight_update", deadline)

    def update(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._request("POST", "update_weights", deadline, {"update_info": info})

    def finish(self, version: str | None, deadline: Deadline) -> None:
        self._request("POST", "finish_weight_update", deadline, {"weight_version": version})

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        self._request("POST", "pause", deadline, query={"mode": mode, "clear_cache": "false"})

    def resume(self, deadline: Deadline) -> None:
        self._request("POST", "resume", deadline)

    def reset_caches(self, recompute: bool, deadline: Deadline) -> bool:
        query = {"reset_running_requests": str(recompute).lower(), "reset_external": "true"}
        answer = self._request("POST", "reset_prefix_cache", deadline, query=query)
        self._request("POST", "reset_encoder_cache", deadline)
        return bool(isinstance(answer, dict) and answer.get("success"))

    def close(self) -> None:
        self._client.close()

    def _request(
        self,
        method: str,
        route: str,
        deadline: Deadline,
        body: dict[str, Any] | None = None,
        query: dict[str, str] | None = None,
    ) -> Any:
        seconds = deadline.remaining() + _MARGIN
        limits = httpx.Timeout(seconds, connect=min(seconds, self._connect_timeout))
        try:
            response = self._client.request(method, f"/{route}", json=body, params=query, timeout=limits)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            unknown = _is_of_unknown_host(error)
            why = "nobody knows its host's name; correct the URL" if unknown else "start it, or correct the URL"
            message = f"vLLM cannot be reached: {why}."
            raise PeerLostError(message, peer=self.address, cause=_text(error), permanent=unknown) from error
        except httpx.TimeoutException as error:
            message = f"vLLM did not answer /{route} within {seconds:.1f} s."
            raise TransferTimeoutError(message, peer=self.address, cause=_text(error)) from error
        except httpx.TransportError as error:
            message = "vLLM went away, or does not speak HTTP."
            raise PeerLostError(message, peer=self.address, cause=_text(error)) from error
        return self._answer(response, route)

    def _answer(self, response: httpx.Response, route: str) -> Any:
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError as error:
                message = f"/{route} answered with something else than JSON; is this vLLM's URL?"
                raise HandshakeError(message, peer=self.address) from error
        status = response.status_code
        if status in (401, 403):
            raise HandshakeError(
                f"/{route} refuses the API key (HTTP status {status}); give the right one: HttpServer(url, api_key).",
                peer=self.address,
            )
        if status in (404, 405):
            raise HandshakeError(
                f"The server has no route /{route}; start vLLM with VLLM_SERVER_DEV_MODE=1, and check the URL.",
                peer=self.address,
            )
        raise failure(f"HTTP status {status}: {_told(response)}", self.address)


def _told(response: httpx.Response) -> str:
    """Return what a failed request's answer says; vLLM 0.33 gives ``{"error": {"message": ...}}``, or text there."""
    try:
        answer = response.json()
    except ValueError:
        return response.text
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _is_of_unknown_host(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
