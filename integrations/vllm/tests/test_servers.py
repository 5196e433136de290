"""The forms in which vLLM is met: which is chosen, what each calls, and what vLLM's failures become."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from types import ModuleType
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import weight_transfer as wt
from support.fake_vllm import FakeAsyncLlm, FakeLlm, FakeVllm, Whole, running_loop
from weight_transfer.authoring import Deadline
from weight_transfer.control import ReplyTo, Server
from weight_transfer.errors import embed
from weight_transfer_vllm import AsyncServer, HttpServer, LlmServer, RayServer, VllmChannel
from weight_transfer_vllm.calling import Caller
from weight_transfer_vllm.envelope import Envelope
from weight_transfer_vllm.failures import failure, foreign
from weight_transfer_vllm.servers import server_of

CONFIG = wt.load_config(backend="loopback", timeout=10)


class FakeRay(ModuleType):
    """Ray, in this process: a call runs when its reference is made."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.timeouts: list[float] = []

    class GetTimeoutError(Exception):
        pass

    def get(self, references: list[Any], timeout: float) -> list[Any]:
        self.timeouts.append(timeout)
        for reference in references:
            if isinstance(reference, Exception):
                raise reference
        return references


class Handle:
    """A handle of an actor: its methods have ``remote``, and it has no others."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __repr__(self) -> str:
        return "Actor(LLM)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(getattr(self._actor, name))


Handle.__module__ = "ray.actor"


class Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *arguments: Any, **named: Any) -> Any:
        try:
            result = self._method(*arguments, **named)
            return asyncio.run(result) if asyncio.iscoroutine(result) else result
        except Exception as error:  # noqa: BLE001  (`get` raises it)
            return error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.mark.parametrize("form", [FakeLlm, FakeAsyncLlm])
def test_ray_actors_of_either_kind_receive(ray: FakeRay, form: type) -> None:
    vllm = FakeVllm(CONFIG)
    one, two = Whole(1), Whole(2)
    with VllmChannel([Handle(form(vllm))]) as vllms, wt.WeightSender(CONFIG, [vllms]) as sender:
        for version, model in enumerate((one, two, one)):
            sender.send(model, version=version)
            assert all(part.is_of(model) for part in vllm.parts) and vllm.version == str(version)
            assert not vllm.paused
    assert vllms.address == "Actor(LLM)"
    assert all(0 < timeout <= 300 for timeout in ray.timeouts)
    vllm.close()


def test_an_actor_that_cannot_say_how_many_workers_it_has_may_be_told(ray: FakeRay) -> None:
    assert RayServer([Handle(FakeAsyncLlm(FakeVllm(CONFIG)))]).world_size(Deadline(1)) is None
    assert RayServer([Handle(FakeAsyncLlm(FakeVllm(CONFIG)))], workers=2).world_size(Deadline(1)) == 2
    assert RayServer([Handle(FakeLlm(FakeVllm(CONFIG, 1)))]).world_size(Deadline(1)) == 1
    with pytest.raises(wt.ConfigError, match="at least one handle"):
        RayServer([])


def test_an_actor_that_is_late_is_a_timeout(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(references: list[Any], timeout: float) -> list[Any]:
        raise FakeRay.GetTimeoutError("late")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(wt.TransferTimeoutError, match="vLLM did not answer in time"):
        RayServer([Handle(FakeLlm(FakeVllm(CONFIG, 1)))]).start(False, Deadline(1))


def test_what_is_given_chooses_the_server() -> None:
    vllm = FakeVllm(CONFIG, 1)
    found = [server_of(target) for target in ("http://127.0.0.1:8000/", FakeLlm(vllm), Handle(FakeLlm(vllm)))]
    assert [type(server) for server in found] == [HttpServer, LlmServer, RayServer]
    assert found[0].address == "http://127.0.0.1:8000"
    assert server_of(found[0]) is found[0]

    async def inside() -> object:
        return server_of(FakeAsyncLlm(vllm))

    assert isinstance(asyncio.run(inside()), AsyncServer)
    for server in found:
        server.close()


@pytest.mark.parametrize("target", [None, 7, [], "127.0.0.1:8000", "ftp://host", "http://", object()])
def test_what_is_no_vllm_is_refused(target: object) -> None:
    with pytest.raises(wt.ConfigError, match=r"is no vLLM|is not the URL of a vLLM server"):
        server_of(target)


def test_an_async_llm_outside_of_its_loop_needs_that() -> None:
    with pytest.raises(wt.ConfigError, match=r"AsyncServer\(async_llm, loop\)"):
        server_of(FakeAsyncLlm(FakeVllm(CONFIG, 1)))


def test_a_loop_that_stands_still_is_told_apart_from_a_slow_vllm() -> None:
    vllm = FakeVllm(CONFIG, 1)
    released = threading.Event()
    with running_loop() as loop:
        server = AsyncServer(FakeAsyncLlm(vllm), loop)
        loop.call_soon_threadsafe(released.wait, 10)
        with pytest.raises(wt.TransferTimeoutError, match=r"event loop of vLLM, which stands still; .*asend"):
            server.resume(Deadline(0.1))
        released.set()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
        vllm.gate.clear()
        with pytest.raises(wt.TransferTimeoutError, match="while waiting for vLLM"):
            server.update({}, Deadline(1))
        vllm.gate.set()
    with pytest.raises(wt.PeerLostError):
        server.resume(Deadline(1))


def test_sending_on_the_loop_of_an_async_llm_goes_on_with_asend() -> None:
    vllm, model = FakeVllm(CONFIG), Whole(1)

    async def train() -> None:
        with VllmChannel(FakeAsyncLlm(vllm)) as vllms:
            async with wt.WeightSender(CONFIG, [vllms]) as sender:
                await sender.asend(model, version=1)

    asyncio.run(train())
    assert all(part.is_of(model) for part in vllm.parts)
    vllm.close()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/elsewhere", "no route /init_weight_transfer_engine; start vLLM with VLLM_SERVER_DEV_MODE=1"),
        ("/init_weight_transfer_engine", "answered with something else than JSON; is this vLLM's URL"),
    ],
)
def test_a_server_that_is_no_vllm_for_trainers_is_told_as_such(path: str, words: str) -> None:
    app = Starlette(routes=[Route(path, lambda request: PlainTextResponse("hello"), methods=["POST"])])
    with Server(app, "127.0.0.1", 0) as server:
        http = HttpServer(server.url)
        with pytest.raises(wt.HandshakeError, match=words):
            http.init({}, Deadline(5))
        http.close()


def test_a_host_that_nobody_knows_is_not_asked_again() -> None:
    http = HttpServer("http://no-such-host.invalid:8000")
    with pytest.raises(wt.PeerLostError) as caught:
        http.world_size(Deadline(5))
    http.close()
    assert caught.value.permanent or "Temporary" in str(caught.value.cause)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"Worker failed with error 'rank 1: {embed(wt.IntegrityError('Bad bytes.'))}', please", wt.IntegrityError),
        ("EngineCore encountered an issue. See stack trace (above) for the root cause.", wt.PeerLostError),
        ("Executor failed.", wt.PeerLostError),
        ("Weight transfer not configured. Please set weight_transfer_config", wt.HandshakeError),
        ("anything else", wt.TransferError),
    ],
)
def test_what_vllm_says_becomes_an_error_of_this_library(text: str, kind: type) -> None:
    for error in (failure(text, "http://vllm"), foreign(RuntimeError(text), "http://vllm")):
        assert type(error) is kind


def test_the_errors_of_clients_become_errors_of_this_library() -> None:
    class EngineDeadError(Exception):
        pass

    class ActorDiedError(type("RayActorError", (Exception,), {})):  # type: ignore[misc]
        pass

    known = wt.HandshakeError("It stays.")
    assert foreign(known, "vllm") is known
    assert isinstance(foreign(EngineDeadError("x"), "vllm"), wt.PeerLostError)
    assert isinstance(foreign(ActorDiedError("x"), "vllm"), wt.PeerLostError)
    assert isinstance(foreign(ConnectionResetError("x"), "vllm"), wt.PeerLostError)
    assert isinstance(foreign(TimeoutError("x"), "vllm"), wt.TransferTimeoutError)
    long = foreign(RuntimeError("x" * 10**6), "vllm")
    assert long.cause is not None and len(long.cause) == 2000


def test_calls_come_one_after_another_each_with_its_deadline() -> None:
    caller, begun, released, late = Caller("test"), threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        released.wait(10)

    with pytest.raises(TimeoutError):
        caller(slow, Deadline(1))
    assert begun.is_set()
    with pytest.raises(TimeoutError):
        caller(late.set, Deadline(0.1))
    since = time.monotonic()
    threading.Timer(0.1, released.set).start()
    assert caller(lambda: "after it", Deadline(10)) == "after it"
    assert time.monotonic() - since < 5
    assert not late.is_set(), "a call that nobody waits for any more has been made"
    with pytest.raises(ZeroDivisionError):
        caller(lambda: 1 / 0, Deadline(10))
    caller.close()


TO = ReplyTo("127.0.0.1:1", "token", "id")


def test_an_envelope_comes_out_as_it_went_in_and_keeps_the_token_out_of_logs() -> None:
    envelope = Envelope("update", {"version": 7}, TO)
    assert Envelope.from_wire(envelope.to_wire()) == envelope
    assert "'token'" not in repr(envelope)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "was called by something else"),
        ({"master_address": "127.0.0.1", "world_size": 3}, "was called by something else"),
        ({"weight_transfer": {"call": "init"}}, "was called by something else"),
        ({"weight_transfer": {"call": "sing", "data": {}, "reply": TO.to_wire()}}, "a call 'sing' that this one does"),
        ({"weight_transfer": {"call": "init", "data": {}, "reply": {}}}, "address: this key is required and missing"),
    ],
)
def test_what_is_no_envelope_is_refused_in_words(info: dict[str, Any], words: str) -> None:
    with pytest.raises(wt.ConfigError, match=words):
        Envelope.from_wire(info)


@pytest.mark.parametrize("mode", ["", "stop", None])
def test_a_way_to_pause_that_there_is_not_is_refused(mode: Any) -> None:
    with pytest.raises(wt.ConfigError, match="pause_mode: expected one of 'keep', 'wait', 'abort'"):
        VllmChannel("http://127.0.0.1:1", pause_mode=mode)
