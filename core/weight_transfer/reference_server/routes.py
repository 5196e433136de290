"""The worker's HTTP application: OpenAI's routes beside those of the control channel."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from weight_transfer.config.structuring import brief
from weight_transfer.control.guard import Guard, Refusal
from weight_transfer.control.http_door import Door
from weight_transfer.control.http_server import create_app
from weight_transfer.control.limits import HttpLimits
from weight_transfer.errors import ConfigError, TransferTimeoutError, WeightTransferError
from weight_transfer.reference_server.answers import Answer, Part, continuation
from weight_transfer.reference_server.wishes import NoModelError, read

if TYPE_CHECKING:
    from starlette.requests import Request

    from weight_transfer.reference_server.batching import Batching, Sampling
    from weight_transfer.reference_server.hosted import Hosted
    from weight_transfer.reference_server.metrics import Metrics
    from weight_transfer.reference_server.wishes import Wish
    from weight_transfer.session.receiver import WeightReceiver
    from weight_transfer.values.events import Version

T = TypeVar("T")

VERSION = "x-weight-version"
"""The header that names the version that made an answer, quoted as in a URL."""

_LIMITS = HttpLimits(body_bytes="16MiB")  # a prompt of a million tokens, as ids or as text
_LEFT = 499  # as other servers count clients that close the connection before they are answered
_Chunks = asyncio.Queue[dict[str, Any] | Exception | None]


class Routes:
    """Answers requests.

    A request holds the version that it began with until its last token: an update waits for it, and requests that come
    meanwhile wait for the update. No answer waits for its reader, who may be slow, while it holds a version.

    Args:
        hosted: the model.
        batching: generates with it.
        receiver: brings its weights.
        metrics: count requests.
        token: bearer token that every request must carry; None for none.
    """

    def __init__(
        self, hosted: Hosted, batching: Batching, receiver: WeightReceiver, metrics: Metrics, token: str | None
    ) -> None:
        self._hosted = hosted
        self._batching = batching
        self._receiver = receiver
        self._metrics = metrics
        self._door = Door(Guard(token, None), _LIMITS)
        self._token = token
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="weight-transfer requests")
        self._created = int(time.time())  # noqa: TID251  (the time of day)

    def app(self) -> Starlette:
        """Return the application, with the routes of `create_app` below its own."""
        return Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
                Route("/v1/{rest:path}", self._unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
                Route("/metrics", self._tell_metrics, methods=["GET"]),
                Mount("/", create_app(self._receiver, self._token)),
            ]
        )

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _models(self, request: Request) -> Response:
        try:
            self._door.admit(request)
        except Refusal as refusal:
            return _refused(refusal)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: Request) -> Response:
        try:
            self._door.admit(request)
        except Refusal as refusal:
            return _refused(refusal)
        name = request.path_params["name"]
        if name != self._hosted.name:
            return _no_model(f"This server has no model {brief(name)}; it has {self._hosted.name!r}.")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        status = self._receiver.status()
        model = {"id": self._hosted.name, "object": "model", "created": self._created, "owned_by": "weight-transfer"}
        model |= {"weight_version": status["version"], "weight_digest": status.get("digest")}
        return model | {"max_model_len": self._hosted.context}

    async def _unknown(self, request: Request) -> Response:
        return _error(404, "invalid_request_error", f"There is no {request.method} {brief(request.url.path)} here.")

    async def _tell_metrics(self, request: Request) -> Response:
        try:
            self._door.admit(request)
        except Refusal as refusal:
            return _refused(refusal)
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, chat: bool) -> Response:
        try:
            self._door.admit(request)
            wish = await self._read(await self._door.body_of(request), chat)
            response = await _unless_left(request, self._streamed(wish) if wish.stream else self._whole(wish))
        except Refusal as refusal:
            response = _refused(refusal)
        except ClientDisconnect:
            response = Response(status_code=_LEFT)
        except NoModelError as error:
            response = _no_model(str(error))
        except ConfigError as error:
            response = _error(400, "invalid_request_error", str(error))
        except TransferTimeoutError as error:
            response = _error(503, "unavailable_error", str(error))
        except WeightTransferError as error:
            response = _error(500, "server_error", str(error))
        self._metrics.ended(request.url.path, response.status_code)
        return response

    async def _read(self, body: bytes, chat: bool) -> Wish:
        """Read a request on a thread, one at a time, as tokenizers want it: a long prompt takes seconds."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, lambda: read(_parsed(body), self._hosted, chat))

    async def _whole(self, wish: Wish) -> Response:
        async with self._serving() as version:
            parts = await _all(self._collect(wish, *continued) for continued in wish.continued)
        self._count(wish, [len(part.tokens) for part in parts])
        answer = Answer(wish, self._hosted.name, version)
        headers = {VERSION: quote(str(version))}
        # on a thread: a million log-probabilities take seconds
        return await asyncio.to_thread(lambda: JSONResponse(answer.whole(parts), headers=headers))

    async def _collect(self, wish: Wish, prompt: list[int], sampling: Sampling) -> Part:
        parts = [part async for part in continuation(wish, prompt, sampling, self._hosted, self._batching)]
        return Part(
            text="".join(part.text for part in parts),
            tokens=parts[-1].tokens,
            told=[told for part in parts for told in part.told],
            reason=parts[-1].reason,
        )

    async def _streamed(self, wish: Wish) -> Response:
        chunks: _Chunks = asyncio.Queue()
        producing = asyncio.create_task(self._produce(wish, chunks))
        try:
            first = await chunks.get()
        except asyncio.CancelledError:
            producing.cancel()
            raise
        if not isinstance(first, dict):
            await producing
            raise first if first is not None else WeightTransferError("Generation has ended before its first token.")
        headers = {VERSION: quote(str(first["weight_version"]))}
        return StreamingResponse(_events(first, chunks, producing), media_type="text/event-stream", headers=headers)

    async def _produce(self, wish: Wish, chunks: _Chunks) -> None:
        """Put the chunks of an answer into a queue, and None after them; an error instead, if there is one."""
        try:
            async with self._serving() as version:
                answer = Answer(wish, self._hosted.name, version)
                counts = await _all(
                    self._feed(wish, index, *continued, answer, chunks)
                    for index, continued in enumerate(wish.continued)
                )
            if wish.with_usage:
                chunks.put_nowait(answer.last(counts))
            self._count(wish, counts)
        except WeightTransferError as error:
            chunks.put_nowait(error)
        finally:
            chunks.put_nowait(None)

    async def _feed(
        self, wish: Wish, index: int, prompt: list[int], sampling: Sampling, answer: Answer, chunks: _Chunks
    ) -> int:
        tokens = 0
        async for part in continuation(wish, prompt, sampling, self._hosted, self._batching):
            tokens = len(part.tokens)
            chunks.put_nowait(answer.chunk(index, part))
        return tokens

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[Version]:
        """Hold a version still inside a block."""
        async with AsyncExitStack() as stack:
            with self._metrics.waiting():
                version = await stack.enter_async_context(self._receiver.aserving())
            with self._metrics.running():
                yield version

    def _count(self, wish: Wish, generated: list[int]) -> None:
        self._metrics.used(sum(map(len, wish.prompts)), sum(generated))


async def _unless_left(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Wait for an answer, and end it if the client goes away meanwhile."""
    answer = asyncio.ensure_future(answering)
    left = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=_LEFT)
    finally:
        answer.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls side by side; none goes on once one has failed."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


async def _events(first: dict[str, Any], chunks: _Chunks, producing: asyncio.Task[None]) -> AsyncIterator[str]:
    """Yield server-sent events; if the reader goes away, generation ends."""
    try:
        chunk: dict[str, Any] | Exception | None = first
        while chunk is not None:
            told = chunk if isinstance(chunk, dict) else _told("server_error", str(chunk))
            yield f"data: {json.dumps(told)}\n\n"
            chunk = await chunks.get()
        yield "data: [DONE]\n\n"
    finally:
        producing.cancel()


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError("request: the body is no JSON.", cause=str(error)) from error
    if not isinstance(data, dict):
        raise ConfigError("request: the body must be a JSON object.")
    return data


def _told(kind: str, message: str, code: str | None = None) -> dict[str, Any]:
    printable = message.encode(errors="backslashreplace").decode()  # a template may quote half of a character
    return {"error": {"message": printable, "type": kind, "param": None, "code": code}}


def _error(status: int, kind: str, message: str) -> Response:
    return JSONResponse(_told(kind, message), status_code=status)


def _no_model(message: str) -> Response:
    return JSONResponse(_told("invalid_request_error", message, "model_not_found"), status_code=404)


def _refused(refusal: Refusal) -> Response:
    """Answer, and close the connection: what else comes on it is not read."""
    kind = "authentication_error" if refusal.status in (401, 403) else "invalid_request_error"
    return JSONResponse(_told(kind, str(refusal.error)), status_code=refusal.status, headers={"Connection": "close"})
