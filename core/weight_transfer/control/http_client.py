"""A control channel over HTTP, with the route names of vLLM's server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.control.event_loop import EventLoop
from weight_transfer.control.http_requests import OPTIONAL, Answer, Requests, parsed, unconnected
from weight_transfer.control.line import CONTENT_TYPE, ROUTE
from weight_transfer.control.line_client import Line, NoLine
from weight_transfer.control.message import encode
from weight_transfer.control.tls import Tls
from weight_transfer.errors import HandshakeError, PeerLostError, error_from_dict, extract

if TYPE_CHECKING:
    from weight_transfer.control.line_wires import PlainWire
    from weight_transfer.values.events import Version

logger = logging.getLogger(__name__)

_PHASES = {"begin_weight_update": "update"}
_WATCHED = 2  # updates that a worker is asked to start before others may begin without its consent
_UNKNOWN = ("session", "update")  # to some servers: they are left out if they say nothing
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
        tls: certificate files, for an ``https://`` address.

    Attributes:
        carries_session: False once a server has been found to have no ``/status``: then its calls are vLLM's, which
            hand on no session.

    Raises:
        ConfigError: ``address`` is no URL, or a certificate file cannot be read.
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
        tls: Tls | None = None,
    ) -> None:
        self.address = address.rstrip("/")
        self.workers, self.text_versions = workers, text_versions
        self.carries_session = True
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._status_timeout = status_timeout
        self._url = parsed(self.address)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = (tls or Tls()).for_trainer() if self._url.scheme == "https" else None
        self._requests = Requests(self.address, self._headers, connect_timeout, self._tls)
        self._lock = threading.Lock()
        self._loop: EventLoop | None = None
        self._line: Line | None = None
        self._joined_over: Line | None = None
        self._opening: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._offers_line = False
        self._updates = 0

    @property
    def begins(self) -> bool:
        """Whether `begin_weight_update` may be called: the worker is the one that was joined, and has no samplers.

        Both is known by the line to it: that it has not been lost since, and that the worker has not said on it that it
        may have to wait for samplers, through one interval between updates at least. Else it has to be asked by
        ``start_weight_update``, before others write what it may refuse. A subclass that has methods of its own needs
        one of this name, too.
        """
        if not self.submits and type(self).begin_weight_update is HttpChannel.begin_weight_update:
            return False
        line = self._line
        if line is None or line is not self._joined_over or not line.is_open:
            return False
        return not line.waits and self._updates >= _WATCHED

    @property
    def submits(self) -> bool:
        """Whether `submit` does what the methods do: it knows nothing of those that a subclass has overridden."""
        return type(self) is HttpChannel

    @property
    def wire(self) -> PlainWire | None:
        """The connection on which answers to `submit` come, if whoever waits for them may read it; None if not."""
        line = self._line
        return line.socket if line is not None and line.is_open else None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any] | None:
        answer: dict[str, Any] | None = self.submit("init_weight_transfer_engine", init_info=init_info).result()
        return answer

    def start_weight_update(self, session: str | None = None) -> None:
        self.submit("start_weight_update", session=session).result()

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        report: dict[str, Any] | None = self.submit("update_weights", update_info=update_info).result()
        return report

    def begin_weight_update(self, update_info: dict[str, Any]) -> dict[str, Any] | None:
        """Start an update and receive its weights, in one request; the session is that of ``update_info``."""
        report: dict[str, Any] | None = self.submit("begin_weight_update", update_info=update_info).result()
        return report

    def expect_weight_update(self, session: str | None = None) -> Future[None] | None:
        """Say over the line, if one is open, that an update is about to start; see `ControlChannel`."""
        line = self._note("expect_weight_update", session=session)
        gone: Future[None] | None = None
        if line is not None and line.socket is None:
            with self._lock:
                if self._loop is not None:
                    gone = Future()
                    self._loop.loop.call_soon_threadsafe(gone.set_result, None)
        return gone

    def decide_weight_update(self, update: str, digest: str = "", session: str | None = None) -> None:
        """Say over the line, if one is open, that an update is to be published; see `ControlChannel`."""
        self._note("decide_weight_update", update=update, digest=digest, session=session)

    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Ask what the workers keep; None if the server has no such route, so that all weights have to go whole."""
        answer: dict[str, Any] | None = self.submit("weight_needs", request=request).result()
        return answer

    def finish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        self.submit("finish_weight_update", weight_version=weight_version, session=session, update=update).result()

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        """Have the update given up; nothing happens if the server has no such route."""
        self.submit("abort_weight_update", reason=reason, session=session).result()

    def status(self) -> dict[str, Any]:
        """Ask how the workers are; an empty dict if the server has no such route."""
        status: dict[str, Any] | None = self.submit("status").result()
        return status or {}

    def submit(self, method: str, **arguments: Any) -> Future[Any]:
        """Begin a call of one of the methods, and return at once; the result is what the method returns, or raises.

        Args:
            method: its name.
            arguments: its arguments, by name.

        Raises:
            TypeError, ValueError: an argument is not JSON-safe.
        """
        own = self._status_timeout if method == "status" else _timeout_in(arguments)
        where = {"peer": self.address, "phase": _PHASES.get(method, method.partition("_")[0])}
        body = encode({name: value for name, value in arguments.items() if name not in _UNKNOWN or value is not None})
        call = _Call(method, body, (own or self._timeout) + _MARGIN, where)
        line = self._line
        if line is not None and line.is_open:
            self._ask(line, call)
            return call.result
        with self._lock:
            if self._loop is None:
                self._loop = EventLoop.shared()
            self._loop.loop.call_soon_threadsafe(self._begin, call)
        return call.result

    def _note(self, method: str, **arguments: Any) -> Line | None:
        """Say something over the line that has no answer, and return the line; None if none is open."""
        line = self._line
        if line is None or not (line.is_open and self.submits):
            return None
        line.note(method, encode({name: value for name, value in arguments.items() if value is not None}))
        return line

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._hang_up(), loop.loop).result()
            loop.release()

    def __enter__(self) -> HttpChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        line = " over a line" if self._line is not None and self._line.is_open else ""
        return f"<HttpChannel to {self.address}{line}>"

    # On the event loop.

    def _begin(self, call: _Call) -> None:
        if self._line is not None and self._line.is_open:
            self._ask(self._line, call)
            return
        task = asyncio.get_running_loop().create_task(self._connect_and_ask(call))
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    def _ask(self, line: Line, call: _Call) -> None:
        if call.method == "init_weight_transfer_engine":
            self._joined_over, self._updates = line, 0
        line.ask(call.method, call.body, call.seconds, call.where, lambda answer: self._settle(call, answer))

    async def _connect_and_ask(self, call: _Call) -> None:
        answer: Answer | Exception
        try:
            line = await self._open_line(call) if self._offers_line else None
            if line is not None:
                self._ask(line, call)
                return
            answer = await self._requests.ask(call.method, call.body, call.seconds, call.where)
        except asyncio.CancelledError:
            answer = PeerLostError("The channel to the worker was closed.", **call.where)
        except Exception as error:  # noqa: BLE001  (raised where the result is awaited)
            answer = error
        self._settle(call, answer)

    async def _open_line(self, call: _Call) -> Line | None:
        """Open the line, or wait for it if another call opens it; None if the server does not open one after all."""
        while self._opening is not None:
            await asyncio.wait([self._opening])
        if self._line is not None and self._line.is_open:
            return self._line
        self._opening = asyncio.get_running_loop().create_future()
        url = self._url
        headers = [("Host", url.netloc.decode()), ("Content-Type", CONTENT_TYPE), *self._headers.items()]
        target = f"{url.raw_path.decode().rstrip('/')}/{ROUTE}"
        port = url.port or (443 if self._tls else 80)
        try:
            seconds = min(call.seconds, self._connect_timeout)
            self._line = await Line.open(url.host, port, target, headers, self._tls, seconds)
        except NoLine as error:
            logger.warning("%s offers a line but opens none, so each call is a request of its own: %s", url, error)
            self._offers_line = False
            return None
        except OSError as error:
            raise unconnected(error, call.where) from error
        finally:
            self._opening.set_result(None)
            self._opening = None
        await self._requests.close()
        return self._line

    def _settle(self, call: _Call, answer: Answer | Exception) -> None:
        try:
            if isinstance(answer, Exception):
                raise answer
            result = self._result(call, answer)
        except Exception as error:  # noqa: BLE001  (raised where the result is awaited)
            call.result.set_exception(error)
        except BaseException as error:  # Ctrl-C: it is for this thread, whoever waits for the result
            call.result.set_exception(error)
            raise
        else:
            call.result.set_result(result)

    def _result(self, call: _Call, answer: Answer) -> Any:
        """Return the result of a call, or raise what the worker told."""
        missing = call.method in OPTIONAL and answer.status in (404, 405)
        if call.method == "status":
            self._learn(None if missing else answer.body)
        if missing:
            return None
        if 200 <= answer.status < 300:
            self._updates += call.method == "finish_weight_update"
            return answer.body
        told = answer.body.get("error") if isinstance(answer.body, dict) else None
        if isinstance(told, dict):
            known = error_from_dict(told)
            raise extract(known.message) or known
        raise extract(json.dumps(answer.body, ensure_ascii=False)) or HandshakeError(
            f"/{call.method} answered with HTTP status {answer.status}; is this the worker's URL?", **call.where
        )

    def _learn(self, status: object) -> None:
        self.carries_session = status is not None
        self._offers_line = isinstance(status, dict) and status.get("line") is True

    async def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._requests.close()


@attrs.frozen(eq=False)
class _Call:
    """One call.

    Attributes:
        method: the channel's method; the route has its name.
        body: JSON.
        seconds: that it may take.
        where: fields of errors.
        result: is set in the end.
    """

    method: str
    body: bytes
    seconds: float
    where: dict[str, Any]
    result: Future[Any] = attrs.field(factory=Future)


def _timeout_in(arguments: Mapping[str, Any]) -> float | None:
    found = (value.get("timeout") for value in arguments.values() if isinstance(value, dict))
    return next((seconds for seconds in found if seconds), None)
