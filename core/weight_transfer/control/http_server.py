"""The worker's HTTP server: a control channel behind vLLM's route names. JSON only."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

try:
    import anyio
    import anyio.to_thread
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:  # pragma: no cover
    raise ImportError("Serving over HTTP needs its extra: pip install 'weight-transfer[http]'") from error

from weight_transfer.config.structuring import structure
from weight_transfer.control.channel import takes_session
from weight_transfer.control.guard import Guard, Refusal, is_loopback
from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    ManifestMismatchError,
    TransferTimeoutError,
    error_to_dict,
)
from weight_transfer.model.info import (
    TRAINER_LEFT,
    WeightNeedsRequest,
    WeightTransferAbortRequest,
    WeightTransferFinishRequest,
    WeightTransferInitRequest,
    WeightTransferStartRequest,
    WeightTransferUpdateRequest,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from weight_transfer.control.channel import ControlChannel
    from weight_transfer.session.receiver import WeightReceiver

_START_TIMEOUT = 30.0  # seconds
_KEEP_ALIVE = 3600  # seconds that an idle connection between two updates stays open
_STATUS = (
    (HandshakeError, 403),
    (ConfigError, 400),
    (LifecycleError, 409),
    (ManifestMismatchError, 409),
    (TransferTimeoutError, 504),
)


def create_app(channel: ControlChannel, token: str | None = None, *, hosts: Sequence[str] | None = None) -> Starlette:
    """Return the ASGI app of a worker, to be mounted in a server of your own.

    Routes: ``POST /init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights``,
    ``/finish_weight_update``, and ``GET /healthz``, which anyone may call; and ``POST /abort_weight_update``,
    ``/weight_needs`` and ``GET /status``, if the channel has them.

    Calls run on threads of their own, so that requests of yours that wait for a version keep none of them waiting. If
    the trainer's connection closes while it waits to join, to start or to update, that is aborted.

    Args:
        channel: a `WeightReceiver`, a `LocalChannel`, or any other.
        token: bearer token that every request must carry.
        hosts: names by which this server may be called, such as ``["worker-3.cluster"]``; loopback always may.
            Default: any if there is a token, else loopback and the address that a request came in on. Pages of other
            origins are refused in any case.

    Raises:
        ConfigError: ``channel`` is none.
    """
    if not hasattr(channel, "init_weight_transfer_engine"):
        raise ConfigError(
            f"What is served must be a WeightReceiver or another control channel, got {type(channel).__name__}; wrap a "
            "model: WeightReceiver(config, model)."
        )
    guard = Guard(token, hosts)
    calls = _Calls(channel)

    def route(path: str, call: Callable[..., Any], body: type, aborts: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _answer(request, guard, calls, call, body, aborts)

        return Route(f"/{path}", endpoint, methods=["POST"])

    async def status(request: Request) -> Response:
        return await _answer(request, guard, calls, channel.status, None)

    def offered(path: str, body: type) -> list[Route]:
        call: Callable[..., Any] | None = getattr(channel, path, None)
        return [] if call is None else [route(path, call, body)]

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"ok": True})

    return Starlette(
        routes=[
            route("init_weight_transfer_engine", channel.init_weight_transfer_engine, WeightTransferInitRequest, True),
            route("start_weight_update", channel.start_weight_update, WeightTransferStartRequest, True),
            route("update_weights", channel.update_weights, WeightTransferUpdateRequest, True),
            route("finish_weight_update", channel.finish_weight_update, WeightTransferFinishRequest),
            *offered("abort_weight_update", WeightTransferAbortRequest),
            *offered("weight_needs", WeightNeedsRequest),
            *([Route("/status", status, methods=["GET"])] if hasattr(channel, "status") else []),
            Route("/healthz", healthz, methods=["GET"]),
        ]
    )


_PASSES = 4
"""Of the event loop, in which it notices that a connection was closed before a call has ended."""


class _Calls:
    """Calls a channel on threads, without the session if the channel does not carry it."""

    def __init__(self, channel: ControlChannel) -> None:
        self._channel = channel
        self._carries = takes_session(channel)
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call, and return the result, or raise."""
        if not self._carries:
            arguments = {name: _without_session(value) for name, value in arguments.items() if name != "session"}
        if self._limiter is None:  # as many threads as there are calls, and none of those that the application shares
            self._limiter = anyio.CapacityLimiter(math.inf)
        return await anyio.to_thread.run_sync(partial(_outcome, call, arguments), limiter=self._limiter)

    async def run_unless_left(self, request: Request, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call, and abort that if the client closes its connection meanwhile."""
        result: Any = None
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                abort: Callable[..., None] | None = getattr(self._channel, "abort_weight_update", None)
                if abort is None:
                    return
                reason = {"reason": TRAINER_LEFT}
                with anyio.CancelScope(shield=True):  # the call may end at the same moment
                    await self.run(abort, reason | _session_of(arguments))

            tasks.start_soon(watch)
            result = await self.run(call, arguments)
            for _ in range(_PASSES):
                await anyio.sleep(0)
            tasks.cancel_scope.cancel()
        return result


@attrs.frozen
class _Failed:
    """What a call raised; a loader may raise even what would end the server."""

    error: BaseException


def _outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return call(**arguments)
    except BaseException as error:  # noqa: BLE001  (it becomes the answer)
        return _Failed(error)


def _session_of(arguments: dict[str, Any]) -> dict[str, Any]:
    found = [value.get("session") for value in arguments.values() if isinstance(value, dict)]
    return {"session": next((session for session in [arguments.get("session"), *found] if session is not None), None)}


def _without_session(value: Any) -> Any:
    return {name: item for name, item in value.items() if name != "session"} if isinstance(value, dict) else value


async def _answer(
    request: Request, guard: Guard, calls: _Calls, call: Callable[..., Any], body: type | None, aborts: bool = False
) -> Response:
    try:
        guard.check(request)
        arguments = {} if body is None else _arguments(await request.body(), body, request.url.path)
        result = await (calls.run_unless_left(request, call, arguments) if aborts else calls.run(call, arguments))
    except Refusal as refusal:
        return JSONResponse({"error": error_to_dict(refusal.error)}, status_code=refusal.status)
    except ConfigError as error:
        result = _Failed(error)
    if isinstance(result, _Failed):
        code = next((code for kind, code in _STATUS if isinstance(result.error, kind)), 500)
        return JSONResponse({"error": error_to_dict(result.error)}, status_code=code)
    return JSONResponse(result) if result is not None else Response(status_code=204)


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
        """Block until the server ends, or until Ctrl-C, after which it still runs: close it."""
        with suppress(KeyboardInterrupt):
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

    def __repr__(self) -> str:
        return f"<Server {self.url}{'' if self._thread.is_alive() else ', closed'}>"

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
    receiver: WeightReceiver | ControlChannel,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Server:
    """Serve a receiver's control channel over HTTP, on a thread of its own, and return at once.

    Args:
        receiver: a receiver, or a channel such as ``LocalChannel(rank0, rank1)``.
        host: address to listen on; anything but a loopback address demands a token.
        port: TCP port; 0 takes a free one, which ``Server.url`` then tells.
        token: bearer token; default is the receiver's ``config.token``.
        hosts: see `create_app`.

    Raises:
        ConfigError: the address is not loopback and there is no token, or it cannot be listened on; or ``receiver`` is
            none.
    """
    config = getattr(receiver, "config", None)
    token = token or getattr(config, "token", None)
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"Listening on {host}, beyond loopback, needs a token: set token in the config on both sides."
        )
    return Server(create_app(receiver, token, hosts=hosts), host, port)


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
