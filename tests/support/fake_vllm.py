"""A double of vLLM 0.33 around real receivers: its workers, its executor, and the forms in which users meet it.

It keeps what a trainer's half has to cope with: one call at a time, and nothing heard during an update; answers of
ranks that are read in order and left behind after the first failure, to be taken for those of the next call; a session
that ends on the rank that raised and on no other.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import nn

import weight_transfer as wt
from weight_transfer.control import Reply, send_reply
from weight_transfer.errors import embed
from weight_transfer_vllm.envelope import Envelope

if TYPE_CHECKING:
    from starlette.requests import Request

_SECONDS = 20


class Whole(nn.Module):
    """The trainer's model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.up = nn.Linear(8, 64, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class Part(nn.Module):
    """What one of ``world`` ranks keeps of it, and how it is loaded.

    Attributes:
        refuses: the next update is refused before its first byte.
        fails: the next update fails when weights have been loaded.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.up = nn.Linear(8, 64 // world, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(64 // world, 8, bias=False, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(8)
        self.refuses = self.fails = False

    def needs(self, _manifest: wt.Manifest) -> dict[str, wt.Target]:
        rows = wt.Region.split((64, 8), 0, self.rank, self.world)
        columns = wt.Region.split((8, 64), 1, self.rank, self.world)
        return {"up.weight": wt.Target(rows, self.up.weight), "down.weight": wt.Target(columns, self.down.weight)}

    def begin(self, _manifest: wt.Manifest) -> None:
        if self.refuses:
            self.refuses = False
            raise wt.ManifestMismatchError(f"Rank {self.rank} takes no such model.", phase="update")

    def __call__(self, weights: Any) -> None:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        if self.fails:
            self.fails = False
            raise RuntimeError(f"rank {self.rank} ran out of luck")

    def is_of(self, model: Whole) -> bool:
        """Return whether all bits are those of the trainer's model."""
        rows, columns = model.up.weight.chunk(self.world)[self.rank], model.down.weight.chunk(self.world, 1)[self.rank]
        return (
            torch.equal(self.up.weight, rows)
            and torch.equal(self.down.weight, columns)
            and torch.equal(self.norm.weight, model.norm.weight)
            and torch.equal(self.norm.bias, model.norm.bias)
        )


class Engine:
    """The worker's half of the envelope, as small as can be.

    Attributes:
        mute: updates are not answered over the line; what is wrong is told by the exception alone.
        drowned: nothing is answered.
        answers_after: seconds that an answer takes longer than the call, which does not wait for it.
        failing: by the call's name in the envelope, what the next one raises.
    """

    def __init__(
        self, part: Part, config: Any, agree: Callable[[int, Exception | None], list[Exception | None]]
    ) -> None:
        self.part, self._config, self._agree = part, config, agree
        self.receiver = self._new()
        self.open = self.mute = self.drowned = False
        self.answers_after = 0.0
        self.failing: dict[str, Exception] = {}
        self._joined: str | None = None
        self._session: tuple[str | None] | None = None  # of an update that has its weights

    def restart(self) -> None:
        self.receiver.close()
        self.receiver = self._new()
        self.open, self._joined = False, None

    def init_transfer_engine(self, info: dict[str, Any]) -> None:
        envelope = Envelope.from_wire(info)
        result, error = _outcome(lambda: self._do(envelope))
        self._answer(envelope, result, error)

    def start_weight_update(self) -> None:
        self.open, self._session = True, None

    def update_weights(self, info: dict[str, Any]) -> None:
        envelope = Envelope.from_wire(info)
        result, error = _outcome(lambda: self._receive(envelope.data))
        outcomes = self._agree(self.part.rank, error)
        told = error or next((other for other in outcomes if other is not None), None)
        self._session = (envelope.data.get("session"),) if told is None else None
        if not self.mute:
            self._answer(envelope, result, told)
        if told is not None and self.part.rank == self.part.world - 1:
            self.open = False
            raise RuntimeError(f"an update failed: {embed(told)}")

    def finish_weight_update(self) -> None:
        self.open = False
        if self._session is not None:
            self.receiver.finish_weight_update(None, *self._session)

    def _fail(self, call: str) -> None:
        error = self.failing.pop(call, None)
        if error is not None:
            raise error

    def _receive(self, info: dict[str, Any]) -> dict[str, Any]:
        self._fail("update")
        self.receiver.start_weight_update(info.get("session"))
        return self.receiver.update_weights(info)

    def _new(self) -> wt.WeightReceiver:
        place = wt.ParallelConfig(rank=self.part.rank, world_size=self.part.world)
        return wt.WeightReceiver(
            self._config, self.part, parallel_config=place, needs=self.part.needs, load_weights=self.part
        )

    def _do(self, envelope: Envelope) -> Any:
        data = envelope.data
        self._fail(envelope.call)
        if envelope.call == "init":
            self._session, self._joined = None, data.get("session")
            return self.receiver.init_weight_transfer_engine(data)
        if envelope.call == "weight_needs":
            return self.receiver.weight_needs(data)
        if envelope.call == "abort":
            self.receiver.abort_weight_update(data["reason"], data["session"])
            self._session = None
        facts = {"open": self.open, "served": self.receiver.state != "failed"}
        if envelope.call == "status":
            facts = {**self.receiver.status(), **facts, "yours": data["session"] == self._joined}
        return facts

    def _answer(self, envelope: Envelope, result: Any, error: Exception | None) -> None:
        if self.drowned:
            return
        known = error if isinstance(error, wt.WeightTransferError) or error is None else wt.TransferError(str(error))
        reply = Reply(rank=self.part.rank, workers=self.part.world, result=result, error=known)
        if self.answers_after:
            threading.Timer(self.answers_after, send_reply, (envelope.reply, reply)).start()
        else:
            send_reply(envelope.reply, reply)


class Worker:
    """vLLM's own part of a worker: it counts sessions."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._active = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        if self._active:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        self.engine.start_weight_update()
        self._active = True

    start_draft_weight_update = start_weight_update

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if not self._active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            self.engine.update_weights(update_info)
        except BaseException:
            self._active = False
            raise

    def finish_weight_update(self) -> None:
        if not self._active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.engine.finish_weight_update()
        self._active = False


class FakeVllm:
    """An engine of ``world`` ranks.

    Attributes:
        events: what it was asked, in order: vLLM's calls, and those of the trainer by their own names.
        gate: an update begins when this is set.
        at_gate: set while an update waits for that.
        dead: it answers nothing any more.
        failing: the method of vLLM that fails the next time, on all ranks, before the worker's half is called.
    """

    def __init__(self, config: Any, world: int = 2) -> None:
        self.world = world
        barrier = threading.Barrier(world)
        outcomes: list[Exception | None] = [None] * world

        def agree(rank: int, error: Exception | None) -> list[Exception | None]:
            outcomes[rank] = error
            barrier.wait(_SECONDS)
            told = list(outcomes)
            barrier.wait(_SECONDS)
            return told

        self.parts = [Part(rank, world) for rank in range(world)]
        self.engines = [Engine(part, config, agree) for part in self.parts]
        self._workers = [Worker(engine) for engine in self.engines]
        self._answers: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(world)]
        self._busy = threading.Lock()
        self.events: list[str] = []
        self.paused = self.dead = False
        self.version: str | None = None
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.failing = ""

    def restart(self) -> None:
        """Stand there as after a start: nobody has joined, and no session is open."""
        for engine in self.engines:
            engine.restart()
        self._workers = [Worker(engine) for engine in self.engines]
        self.paused = False

    def close(self) -> None:
        for engine in self.engines:
            engine.receiver.close()

    def collective_rpc(self, method: str, arguments: dict[str, Any] | None = None) -> None:
        """Call all workers; read their answers in order up to the first failure, as the multiprocess executor does."""
        given = arguments or {}
        envelope = given.get("init_info", given.get("update_info", {})).get("weight_transfer", {})
        if self.dead:
            raise EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        with self._busy:
            self.events.append(envelope.get("call", method))
            if method == "update_weights":
                self.at_gate.set()
                assert self.gate.wait(_SECONDS)
                self.at_gate.clear()
            if method == self.failing:
                self.failing = ""
                raise RuntimeError(f"{method} broke")
            for worker, answers in zip(self._workers, self._answers, strict=True):
                threading.Thread(target=self._run, args=(worker, answers, method, given), daemon=True).start()
            for answers in self._answers:
                _, error = answers.get(timeout=_SECONDS)
                if error is not None:
                    raise RuntimeError(f"Worker failed with error '{error}', please check the stack trace above")

    def leftovers(self) -> int:
        """Return how many answers were left behind."""
        return sum(answers.qsize() for answers in self._answers)

    def pause(self, mode: str) -> None:
        self.events.append(f"pause {mode}")
        self.paused = True

    def resume(self) -> None:
        self.events.append("resume")
        self.paused = False

    def finish(self, version: str | None) -> None:
        self.collective_rpc("finish_weight_update")
        if version is not None:
            self.version = version

    def reset_prefix_cache(self, recompute: bool, external: bool) -> bool:
        assert external
        self.events.append(f"reset {'all' if recompute else 'idle'}")
        return recompute

    def _run(self, worker: Worker, answers: queue.SimpleQueue[Any], method: str, arguments: dict[str, Any]) -> None:
        answers.put(_outcome(lambda: getattr(worker, method)(**arguments)))


class EngineDeadError(Exception):
    """vLLM's."""


class FakeLlm:
    """vLLM's ``LLM``."""

    def __init__(self, vllm: FakeVllm) -> None:
        self._vllm = vllm
        self.llm_engine = self

    def get_world_size(self, include_dp: bool = True) -> int:
        assert include_dp
        return self._vllm.world

    def collective_rpc(self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None) -> None:
        assert timeout is None and not args
        self._vllm.collective_rpc(method, kwargs)

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": request["init_info"]})

    def start_weight_update(self) -> None:
        self.collective_rpc("start_weight_update")

    def start_draft_weight_update(self) -> None:
        self.collective_rpc("start_draft_weight_update")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.collective_rpc("update_weights", kwargs={"update_info": request["update_info"]})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._vllm.finish(weight_version)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert level == 0
        self._vllm.pause(mode)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        assert tags == ["scheduling"]
        self._vllm.resume()
        return True

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return self._vllm.reset_prefix_cache(reset_running_requests, reset_connector)

    def reset_encoder_cache(self) -> None:
        self._vllm.events.append("reset encoder")


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


class FakeAsyncLlm:
    """vLLM's ``AsyncLLM``."""

    def __init__(self, vllm: FakeVllm) -> None:
        self._vllm = vllm
        self.vllm_config = self.parallel_config = self
        self.world_size_across_dp = vllm.world

    async def collective_rpc(self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> None:
        assert timeout is None and not args
        await asyncio.to_thread(self._vllm.collective_rpc, method, kwargs)

    async def start_weight_update(self) -> None:
        await self.collective_rpc("start_weight_update")

    async def start_draft_weight_update(self) -> None:
        await self.collective_rpc("start_draft_weight_update")

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await asyncio.to_thread(self._vllm.finish, weight_version)

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        assert not clear_cache
        self._vllm.pause(mode)

    async def resume_generation(self) -> None:
        self._vllm.resume()

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return self._vllm.reset_prefix_cache(reset_running_requests, reset_connector)

    async def reset_encoder_cache(self) -> None:
        self._vllm.events.append("reset encoder")


def app_of(vllm: FakeVllm, api_key: str | None = None) -> Starlette:
    """Return vLLM's HTTP server, with a proxy in front that asks for a key."""

    def route(path: str, call: Callable[[dict[str, Any], Any], Any], method: str = "POST") -> Route:
        async def endpoint(request: Request) -> Response:
            if api_key is not None and request.headers.get("authorization") != f"Bearer {api_key}":
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            body = await request.json() if await request.body() else {}
            answer = await run_in_threadpool(call, body, request.query_params)
            return JSONResponse(answer if answer is not None else {"message": "done"})

        return Route(path, endpoint, methods=[method])

    def rpc(method: str) -> Callable[[dict[str, Any], Any], Any]:
        return lambda body, query: vllm.collective_rpc(method, body)

    def reset(body: dict[str, Any], query: Any) -> dict[str, bool]:
        wanted = [query.get(name) == "true" for name in ("reset_running_requests", "reset_external")]
        return {"success": vllm.reset_prefix_cache(*wanted)}

    def failed(_request: Request, error: Exception) -> Response:
        dead = isinstance(error, EngineDeadError)
        message = "The server had an error while processing your request." if dead else str(error)
        told = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
        return JSONResponse({"error": told}, status_code=500)

    return Starlette(
        exception_handlers={Exception: failed},  # after which the server closes the connection
        routes=[
            *(
                route(f"/{method}", rpc(method))
                for method in (
                    "init_weight_transfer_engine",
                    "start_weight_update",
                    "start_draft_weight_update",
                    "update_weights",
                )
            ),
            route("/finish_weight_update", lambda body, query: vllm.finish(body.get("weight_version"))),
            route("/pause", lambda body, query: vllm.pause(query["mode"])),
            route("/resume", lambda body, query: vllm.resume()),
            route("/reset_prefix_cache", reset),
            route("/reset_encoder_cache", lambda body, query: vllm.events.append("reset encoder")),
            route("/get_world_size", lambda body, query: {"world_size": vllm.world}, "GET"),
        ],
    )


def _outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001  (it becomes the answer)
        return None, error
