"""The worker's HTTP server: a control channel behind vLLM's route names. JSON only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import anyio
    import anyio.to_thread
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:  # pragma: no cover
    raise ImportError("Serving over HTTP needs its extra: pip install 'weight-transfer[http]'") from error

from weight_transfer import __version__
from weight_transfer.config.settings import WeightTransferConfig
from weight_transfer.control.guard import Guard, Refusal, is_loopback
from weight_transfer.control.http_connections import BACKLOG, LimitedServer, connection_of
from weight_transfer.control.http_door import Door
from weight_transfer.control.limits import HttpLimits
from weight_transfer.control.line import ROUTE
from weight_transfer.control.line_server import PASSES, ServedLine
from weight_transfer.control.openapi import describe
from weight_transfer.control.serving_calls import ServedCalls
from weight_transfer.control.tls import Tls
from weight_transfer.errors import ConfigError, TransferTimeoutError, error_to_dict

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from weight_transfer.control.channel import ControlChannel
    from weight_transfer.session.receiver import WeightReceiver

T = TypeVar("T")

_FAILED = "An update has failed, so no version is served until the next good one."

_START_TIMEOUT = 30.0  # seconds
_KEEP_ALIVE = 3600  # seconds that an idle connection between two updates stays open


def create_app(
    channel: ControlChannel,
    token: str | None = None,
    *,
    hosts: Sequence[str] | None = None,
    limits: HttpLimits | None = None,
) -> Starlette:
    """Return the ASGI app of a worker, to be mounted in a server of your own.

    Routes: ``POST /init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights``,
    ``/finish_weight_update``, ``/begin_weight_update`` (start and update in one), and ``GET /healthz``, which anyone
    may call, and which answers 503 once a failed update has left no version to serve; and
    ``POST /abort_weight_update``, ``/expect_weight_update``, ``/decide_weight_update``, ``/weight_needs`` and
    ``GET /status``, if the channel has them. ``GET /openapi.json`` describes them. Under a `Server` also
    ``POST /line``: one connection for all of a trainer's calls, which saves most of what a request costs.

    Calls run on threads of their own, so that requests of yours that wait for a version keep none of them waiting. If
    the trainer's connection closes while it waits to join, to start or to update, that is aborted.

    Args:
        channel: a `WeightReceiver`, a `LocalChannel`, or any other.
        token: bearer token that every request must carry.
        hosts: names by which this server may be called, such as ``["worker-3.cluster"]``; loopback always may.
            Default: any if there is a token, else loopback and the address that a request came in on. Pages of other
            origins are refused in any case.
        limits: what is taken; of a server of your own those of bodies, the rest is the server's.

    Raises:
        ConfigError: ``channel`` is none.
    """
    if not hasattr(channel, "init_weight_transfer_engine"):
        raise ConfigError(
            f"What is served must be a WeightReceiver or another control channel, got {type(channel).__name__}; wrap a "
            "model: WeightReceiver(config, model)."
        )
    door, calls = Door(Guard(token, hosts), limits or HttpLimits()), ServedCalls(channel)

    def route(name: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return await _answer(request, door, calls, name)

        return Route(f"/{name}", endpoint, methods=["GET" if name == "status" else "POST"])

    async def openapi(request: Request) -> Response:
        try:
            door.admit(request)
        except Refusal as refusal:
            return _refused(refusal)
        return JSONResponse(describe(calls.offers, __version__))

    async def healthz(_request: Request) -> Response:
        if await _on_thread(lambda: getattr(channel, "failed", False) is True):
            return JSONResponse({"ok": False, "error": _FAILED}, status_code=503)
        return JSONResponse({"ok": True})

    app = Starlette(
        routes=[
            *map(route, calls.offers),
            Route(f"/{ROUTE}", _Lines(door, calls), methods=["POST"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
        ]
    )
    app.router.redirect_slashes = False  # what is no route is answered in one way
    return app


async def _answer(request: Request, door: Door, calls: ServedCalls, name: str) -> Response:
    try:
        door.admit(request)
        body = await door.body_of(request)
    except Refusal as refusal:
        return _refused(refusal)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    perform = partial(calls.perform, name, body)
    if calls.offers[name].aborts:
        code, answer = await _unless_left(request, perform, partial(calls.abort, body))
    else:
        code, answer = await _on_thread(perform)
    if name == "status" and code == 200 and isinstance(answer, dict):
        answer = answer | {"line": connection_of(request.scope) is not None}
    return JSONResponse(answer, status_code=code) if code != 204 else Response(status_code=204)


async def _unless_left(
    request: Request, perform: Callable[[], tuple[int, Any]], abort: Callable[[], None]
) -> tuple[int, Any]:
    """Make a call, and abort that if the client closes its connection meanwhile."""
    result: tuple[int, Any] = 204, None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            with anyio.CancelScope(shield=True):  # the call may end at the same moment
                await _on_thread(abort)

        tasks.start_soon(watch)
        result = await _on_thread(perform)
        for _ in range(PASSES):
            await anyio.sleep(0)
        tasks.cancel_scope.cancel()
    return result


async def _on_thread(call: Callable[[], T]) -> T:
    """Call on a thread that is none of those that the application shares, of which there are as many as calls."""
    return await anyio.to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))


def _refused(refusal: Refusal) -> Response:
    """Answer, and close the connection: what else comes on it is not read."""
    answer = {"error": error_to_dict(refusal.error)}
    return JSONResponse(answer, status_code=refusal.status, headers={"Connection": "close"})


class _Lines:
    """Opens lines."""

    def __init__(self, door: Door, calls: ServedCalls) -> None:
        self._door = door
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        try:
            self._door.admit(Request(scope, receive))
        except Refusal as refusal:
            await _refused(refusal)(scope, receive, send)
            return
        if connection is None:
            await Response(status_code=404)(scope, receive, send)
            return
        await ServedLine(self._calls, scope, receive, send, self._door.limits.body_bytes).run(connection)


class Server:
    """A running HTTP server of a worker, on a thread of its own; also a context manager.

    Args:
        app: what it serves.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        limits: on connections; those on bodies are the application's.
        tls: certificate files; with a certificate, HTTPS is served. Trainers' certificates are asked for by the routes
            of `create_app`, and not by others.

    Attributes:
        url: its address, such as ``http://127.0.0.1:8001``.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, limits: HttpLimits | None = None, tls: Tls | None = None
    ) -> None:
        limits, context = limits or HttpLimits(), (tls or Tls()).for_worker()
        self._socket = _bind(host, port)
        bound = self._socket.getsockname()[1]
        self.url = f"http{'s' if context else ''}://{f'[{host}]' if ':' in host else host}:{bound}"
        config = uvicorn.Config(
            app,
            interface="asgi3",
            http="h11",
            log_level="error",  # else whoever sends what is no HTTP fills the log
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=limits.header_bytes,
            ws="none",
        )
        self._uvicorn = LimitedServer(config, limits, context)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"weight-transfer server {self.url}", daemon=True)
        self._thread.start()
        if not self._uvicorn.up.wait(_START_TIMEOUT):
            raise TransferTimeoutError(
                f"The server at {self.url} did not start within {_START_TIMEOUT:g} s.", phase="init"
            )

    def wait(self) -> None:
        """Block until the server ends, or until Ctrl-C, after which it still runs: close it."""
        with suppress(KeyboardInterrupt):
            while not self._ended.wait(1.0):  # in slices, so that Ctrl-C is seen; a join that it ends is never repeated
                pass

    def close(self) -> None:
        """Stop listening and end the thread. The receiver stays as it is."""
        self._uvicorn.should_exit = True
        self._ended.wait(_START_TIMEOUT)
        self._thread.join(_START_TIMEOUT)
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Server {self.url}{', closed' if self._ended.is_set() else ''}>"

    def _run(self) -> None:
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._ended.set()


def serve(
    receiver: WeightReceiver | ControlChannel,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
    limits: HttpLimits | None = None,
    tls: Tls | None = None,
) -> Server:
    """Serve a receiver's control channel over HTTP, on a thread of its own, and return at once.

    Args:
        receiver: a receiver, or a channel such as ``LocalChannel(rank0, rank1)``.
        host: address to listen on; anything but a loopback address demands a token.
        port: TCP port; 0 takes a free one, which ``Server.url`` then tells.
        token: bearer token; default is the receiver's ``config.token``.
        hosts: see `create_app`.
        limits: what is taken, and how long it is waited for.
        tls: certificate files; default is what the receiver's config says.

    Raises:
        ConfigError: the address is not loopback and there is no token, or it cannot be listened on; or ``receiver`` is
            none, or a certificate file cannot be read.
    """
    config = getattr(receiver, "config", None)
    token = token or getattr(config, "token", None)
    require_token(host, token)
    if tls is None and isinstance(config, WeightTransferConfig):
        tls = Tls.of(config)
    return Server(create_app(receiver, token, hosts=hosts, limits=limits), host, port, limits=limits, tls=tls)


def require_token(host: str, token: str | None) -> None:
    """Raise `ConfigError` if an address is to be listened on beyond loopback without a token."""
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"Listening on {host}, beyond loopback, needs a token: set token in the config on both sides."
        )


def require_free(host: str, port: int) -> None:
    """Raise `ConfigError` if an address cannot be listened on now."""
    _bind(host, port).close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP; it would cost 40 ms per answer
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"Cannot listen on {host} port {port}; choose another, or 0 for a free one."
        raise ConfigError(message, cause=str(error)) from error
    return listener
