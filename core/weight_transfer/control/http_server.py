"""The worker's HTTP server: a control channel behind vLLM's route names. JSON only."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import attrs

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:  # pragma: no cover
    raise ImportError("Serving over HTTP needs its extra: pip install 'weight-transfer[http]'") from error

from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    ManifestMismatchError,
    TransferTimeoutError,
    error_to_dict,
)
from weight_transfer.info import (
    WeightTransferAbortRequest,
    WeightTransferFinishRequest,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from weight_transfer.structuring import structure

if TYPE_CHECKING:
    from starlette.requests import Request

    from weight_transfer.control.channel import ControlChannel
    from weight_transfer.receiver import WeightReceiver

_START_TIMEOUT = 30.0  # seconds
_KEEP_ALIVE = 3600  # seconds that an idle connection between two updates stays open
_STATUS = (
    (HandshakeError, 401),
    (ConfigError, 400),
    (LifecycleError, 409),
    (ManifestMismatchError, 409),
    (TransferTimeoutError, 504),
)


def create_app(channel: ControlChannel, token: str | None = None) -> Starlette:
    """Return the ASGI app of a worker, to be mounted in a server of your own.

    Routes: ``POST /init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights``,
    ``/finish_weight_update``, ``/abort_weight_update``, ``GET /status``, and ``GET /healthz`` without a token.

    Args:
        channel: a `WeightReceiver`, a `LocalChannel`, or any other.
        token: bearer token that every request but ``/healthz`` must carry.
    """

    def route(path: str, call: Callable[..., Any], body: type) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _answer(request, call, body, token)

        return Route(f"/{path}", endpoint, methods=["POST"])

    async def status(request: Request) -> Response:
        return await _answer(request, channel.status, None, token)

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"ok": True})

    return Starlette(
        routes=[
            route("init_weight_transfer_engine", channel.init_weight_transfer_engine, WeightTransferInitRequest),
            route("start_weight_update", channel.start_weight_update, _Empty),
            route("update_weights", channel.update_weights, WeightTransferUpdateRequest),
            route("finish_weight_update", channel.finish_weight_update, WeightTransferFinishRequest),
            route("abort_weight_update", channel.abort_weight_update, WeightTransferAbortRequest),
            Route("/status", status, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
        ]
    )


@attrs.frozen
class _Empty:
    """A request without arguments."""


async def _answer(request: Request, call: Callable[..., Any], body: type | None, token: str | None) -> Response:
    try:
        _authorise(request, token)
        arguments = {} if body is None else _arguments(await request.body(), body, request.url.path)
        result = await run_in_threadpool(call, **arguments)
    except Exception as error:  # noqa: BLE001  (the boundary: every failure becomes an answer with its class and sentence)
        code = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        return JSONResponse({"error": error_to_dict(error)}, status_code=code)
    return JSONResponse(result) if result is not None else Response(status_code=204)


def _authorise(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HandshakeError("The bearer token is missing or wrong; set the same token on both sides.")


def _arguments(body: bytes, cls: type, path: str) -> dict[str, Any]:
    try:
        data = json.loads(body or b"{}")
    except ValueError as error:
        raise ConfigError(f"The body of {path} is not valid JSON.", cause=str(error)) from error
    return attrs.asdict(structure(data, cls, f"body of {path}"), recurse=False)


class Server:
    """A running HTTP server of a worker, on a thread of its own; also a context manager.

    Attributes:
        url: its address, such as ``http://127.0.0.1:8001``.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str, port: int) -> None:
        self._socket = _bind(host, port)
        bound = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=2,
            ws="none",
        )
        self._uvicorn = _Uvicorn(config)
        self._thread = threading.Thread(target=self._run, name=f"weight-transfer server {self.url}", daemon=True)
        self._thread.start()
        if not self._uvicorn.up.wait(_START_TIMEOUT):
            raise TransferTimeoutError(
                f"The server at {self.url} did not start within {_START_TIMEOUT:g} s.", phase="init"
            )

    def wait(self) -> None:
        """Block until the server ends."""
        while self._thread.is_alive():
            self._thread.join(1.0)  # in slices, so that Ctrl-C is seen

    def close(self) -> None:
        """Stop listening and end the thread. The receiver stays as it is."""
        self._uvicorn.should_exit = True
        self._thread.join(_START_TIMEOUT)
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        self._uvicorn.run(sockets=[self._socket])


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


def serve(
    receiver: WeightReceiver | ControlChannel, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
) -> Server:
    """Serve a receiver's control channel over HTTP, on a thread of its own, and return at once.

    Args:
        receiver: a receiver, or a channel such as ``LocalChannel(rank0, rank1)``.
        host: address to listen on; anything but a loopback address demands a token.
        port: TCP port; 0 takes a free one, which ``Server.url`` then tells.
        token: bearer token; default is the receiver's ``config.token``.

    Raises:
        ConfigError: the address is not loopback and there is no token, or it cannot be listened on.
    """
    config = getattr(receiver, "config", None)
    token = token or getattr(config, "token", None)
    if not _is_loopback(host) and not token:
        raise ConfigError(
            f"Listening on {host}, beyond loopback, needs a token: set token in the config on both sides."
        )
    return Server(create_app(receiver, token), host, port)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP; it would cost 40 ms per answer
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        message = f"Cannot listen on {host} port {port}; choose another, or 0 for a free one."
        raise ConfigError(message, cause=str(error)) from error
    return listener
