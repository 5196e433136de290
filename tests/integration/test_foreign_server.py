"""A server that speaks vLLM's four calls and nothing else, as vLLM's own does, with receivers behind it.

It drops what workers answer, so nothing can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

import weight_transfer as wt
from support.models import Small, digest
from weight_transfer.errors import embed

if TYPE_CHECKING:
    import torch
    from starlette.requests import Request

pytestmark = pytest.mark.timeout(60)

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10, verify="none")
CALLS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class FourCalls:
    """The server. What a worker raises comes back as text, in an answer of the server's own form.

    Attributes:
        fails: what the calls of a name raise, before or after they have done it.
        asked: the calls that came, and what was asked in vain.
    """

    def __init__(self, *models: Small, wants_text: bool = False) -> None:
        ranks = [wt.ParallelConfig(rank=rank, world_size=len(models)) for rank in range(len(models))]
        self.models, self.wants_text = models, wants_text
        self.receivers = [
            wt.WeightReceiver(CONFIG, model, parallel_config=rank) for model, rank in zip(models, ranks, strict=True)
        ]
        self.fails: dict[tuple[str, str], Exception] = {}
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        routes = [Route(f"/{name}", self._call, methods=["POST"]) for name in CALLS]
        app = Starlette(routes=routes, exception_handlers={404: self._not_found, 500: self._failed})
        self.server = wt.Server(app, "127.0.0.1", 0)
        self.url = self.server.url

    async def _not_found(self, request: Request, _error: Exception) -> JSONResponse:
        self.asked.append(request.url.path[1:])
        return JSONResponse({"detail": "Not Found"}, status_code=404)

    async def _failed(self, _request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(
            {"error": {"message": str(error), "type": "InternalServerError", "param": None, "code": 500}},
            status_code=500,
        )

    async def _call(self, request: Request) -> JSONResponse:
        name = request.url.path[1:]
        self.asked.append(name)
        body = json.loads(await request.body() or b"{}")
        self.bodies.append(body)
        if self.wants_text and not isinstance(body.get("weight_version", ""), str):
            detail = [{"type": "string_type", "loc": ["body", "weight_version"], "msg": "Input should be a string"}]
            return JSONResponse({"detail": detail}, status_code=422)
        arguments = {
            "init_weight_transfer_engine": [body.get("init_info")],
            "start_weight_update": [],
            "update_weights": [body.get("update_info")],
            "finish_weight_update": [body.get("weight_version")],
        }[name]
        try:
            await run_in_threadpool(self._each, name, arguments)
        except Exception as error:
            raise RuntimeError(f"Worker failed with error '{error}', please check the stack trace above") from error
        return JSONResponse({"message": "done"})

    def _each(self, name: str, arguments: list[Any]) -> None:
        """Call the workers side by side; what one raises comes out as text."""
        channel = wt.LocalChannel(*self.receivers)
        try:
            if error := self.fails.pop((name, "before"), None):
                raise error
            getattr(channel, name)(*arguments)
            if error := self.fails.pop((name, "after"), None):
                raise error
        except Exception as error:  # noqa: BLE001  (whatever it is, it comes out as text)
            raise RuntimeError(embed(error)) from None

    @property
    def serves(self) -> list[tuple[Any, str]]:
        return [(receiver.version, digest(model)) for receiver, model in zip(self.receivers, self.models, strict=True)]

    def close(self) -> None:
        self.server.close()
        for receiver in self.receivers:
            receiver.close()


New = Callable[..., FourCalls]


@pytest.fixture
def new() -> Iterator[New]:
    servers: list[FourCalls] = []

    def _new(*models: Small, **arguments: Any) -> FourCalls:
        servers.append(FourCalls(*models, **arguments))
        return servers[-1]

    yield _new
    for server in servers:
        server.close()


def test_a_server_of_four_calls_gets_every_bit_and_is_named_no_session(new: New) -> None:
    server = new(Small(9))
    with wt.WeightSender(CONFIG, [server.url]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            report = sender.send(Small(seed))
            assert (report.version, report.workers) == (version, (server.url,))
            assert server.serves == [(version, digest(Small(seed)))]
    assert server.asked == ["status", CALLS[0], *CALLS[1:] * 3]
    assert "session" not in json.dumps(server.bodies)


@pytest.mark.parametrize("verify", ["wire", "loaded"])
def test_with_verify_a_server_that_drops_answers_is_refused_before_it_is_touched(new: New, verify: str) -> None:
    server = new(Small(9))
    sender = wt.WeightSender(wt.load_config(CONFIG, verify=verify), [server.url])
    with sender, pytest.raises(wt.HandshakeError, match="drops what workers answer") as caught:
        sender.send(Small(1))
    assert "Hand the answers on, or set verify = 'none' on the trainer." in str(caught.value)
    assert (caught.value.peer, caught.value.phase) == (server.url, "init")
    assert server.asked == ["status", CALLS[0], "abort_weight_update"]
    assert server.serves == [(None, digest(Small(9)))]


def test_what_the_server_does_not_offer_is_no_error(new: New) -> None:
    server = new(Small(9))
    with wt.HttpChannel(server.url) as channel:
        assert channel.carries_session
        assert channel.status() == {}
        assert not channel.carries_session
        assert channel.weight_needs({}) is None
        assert channel.abort_weight_update("for no reason") is None
    assert server.asked == ["status", "weight_needs", "abort_weight_update"]


def test_a_server_that_knows_its_status_is_named_sessions() -> None:
    receiver = wt.WeightReceiver(CONFIG, Small(9))
    with receiver, wt.serve(receiver) as server, wt.HttpChannel(server.url) as channel:
        assert channel.status()["workers"] == 1
        assert channel.carries_session


def test_a_server_that_wants_versions_as_text_gets_them_as_text(new: New) -> None:
    server = new(Small(9), wants_text=True)
    with wt.WeightSender(CONFIG, [server.url]) as sender, pytest.raises(wt.HandshakeError, match="HTTP status 422"):
        sender.send(Small(1))
    with wt.HttpChannel(server.url, text_versions=True) as channel, wt.WeightSender(CONFIG, [channel]) as sender:
        for version, seed in enumerate((1, 2, 1)):
            assert sender.send(Small(seed)).version == version
            assert server.serves == [(version, digest(Small(seed)))]
    assert [body["weight_version"] for body in server.bodies[-9:] if "weight_version" in body] == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["the sender is told", "the channel knows", "the channel knows better"])
def test_the_workers_behind_it_are_counted_without_a_status(new: New, how: str) -> None:
    server = new(Small(8), Small(9))
    channel = wt.HttpChannel(server.url, workers=None if how == "the sender is told" else 2)
    told = {"the sender is told": 2, "the channel knows": 1, "the channel knows better": 7}[how]
    with channel, wt.WeightSender(CONFIG, [channel], workers_per_channel=told) as sender:
        for version, seed in enumerate((1, 2, 1)):
            sender.send(Small(seed))
            assert server.serves == [(version, digest(Small(seed)))] * 2
    assert server.bodies[0]["init_info"]["world_size"] == 3


def test_a_status_that_tells_knows_best() -> None:
    with wt.WeightReceiver(CONFIG, Small(9)) as receiver, wt.serve(receiver) as server:
        channel = wt.HttpChannel(server.url, workers=5)
        with channel, wt.WeightSender(CONFIG, [channel]) as sender:
            sender.send(Small(1))
        assert receiver.version == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_comes_back_as_what_it_was_and_the_next_send_joins_anew(new: New, call: str, when: str) -> None:
    server = new(Small(9))
    with wt.WeightSender(CONFIG, [server.url]) as sender:
        if call != CALLS[0]:
            sender.send(Small(1), version=1)
        server.fails[call, when] = wt.IntegrityError('It "fell" <down>.', param="layers.0", phase="update", version=2)
        with pytest.raises(wt.IntegrityError) as caught:
            sender.send(Small(2), version=2)
        error = caught.value
        assert (error.message, error.param, error.peer) == ('It "fell" <down>.', "layers.0", server.url)
        assert not server.fails
        server.asked.clear()
        for version, seed in ((3, 3), (4, 1)):
            sender.send(Small(seed), version=version)
            assert server.serves == [(version, digest(Small(seed)))]
        assert server.asked == ["status", *CALLS, *CALLS[1:]]


def test_a_trainer_that_gives_up_leaves_an_update_which_the_next_join_ends(new: New) -> None:
    """The server hears of no abort, so the update of a source that failed is still open on the worker."""
    server = new(Small(9))

    class Broken(wt.WeightSource):
        def __init__(self, model: Small) -> None:
            self._source = wt.ModuleSource(model)

        def manifest(self) -> wt.Manifest:
            return self._source.manifest()

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            weights = iter(self._source)
            yield next(weights)
            raise OSError("the disk is gone")

    with wt.WeightSender(CONFIG, [server.url]) as sender:
        sender.send(Small(1))
        with pytest.raises(wt.TransferError, match="the disk is gone"):
            sender.send(Broken(Small(2)))
        assert "abort_weight_update" in server.asked
        sender.send(Small(3))
        assert server.serves == [(1, digest(Small(3)))]


@pytest.mark.parametrize(
    "body",
    [
        "{text}",
        "<html><body>{text}</body></html>",
        '{{"detail": "{text}"}}',
        '{{"error": "{text}"}}',
        '["{text}"]',
    ],
)
def test_an_error_is_found_in_whatever_the_server_answers(body: str) -> None:
    async def fail(_request: Request) -> PlainTextResponse:
        text = embed(wt.ManifestMismatchError("It does not fit.", version=7))
        return PlainTextResponse(body.format(text=text), status_code=500)

    app = Starlette(routes=[Route("/start_weight_update", fail, methods=["POST"])])
    with (
        wt.Server(app, "127.0.0.1", 0) as server,
        wt.HttpChannel(server.url) as channel,
        pytest.raises(wt.ManifestMismatchError) as caught,
    ):
        channel.start_weight_update()
    assert (caught.value.message, caught.value.version) == ("It does not fit.", 7)


@pytest.mark.parametrize("status", [["ok"], "ok", None, {"status": "ok"}, {"versions": 5}])
def test_a_status_of_another_kind_says_nothing(status: object) -> None:
    receiver = wt.WeightReceiver(CONFIG, model := Small(9))

    class Own(wt.LocalChannel):
        def status(self) -> Any:
            return status

    with receiver, wt.WeightSender(CONFIG, [Own(receiver)]) as sender:
        sender.send(Small(1))
        assert (receiver.version, digest(model)) == (0, digest(Small(1)))


@pytest.mark.parametrize("workers", [0, -1, "two", 1.5, True])
def test_a_status_with_a_strange_number_of_workers_is_a_sentence(workers: object) -> None:
    class Own(wt.LocalChannel):
        def status(self) -> Any:
            return {"workers": workers}

    receiver = wt.WeightReceiver(CONFIG, Small(9))
    sender = wt.WeightSender(CONFIG, [Own(receiver)])
    with receiver, sender, pytest.raises(wt.HandshakeError, match="a number from 1 on was expected"):
        sender.send(Small(1))


def test_a_channel_without_workers_is_refused_and_an_attribute_of_its_own_is_not_a_number() -> None:
    class Own(wt.LocalChannel):
        workers: Any = None

    with wt.WeightReceiver(CONFIG, Small(9)) as receiver:
        channel = Own(receiver)
        channel.workers = 0
        with pytest.raises(wt.ConfigError, match="0 workers cannot be behind worker 0"):
            wt.WeightSender(CONFIG, [channel])
        channel.workers = [receiver]
        with wt.WeightSender(CONFIG, [channel]) as sender:
            sender.send(Small(1))
        assert receiver.version == 0


def test_an_error_is_found_in_the_text_of_whatever_a_channel_raises() -> None:
    class Actors(wt.LocalChannel):
        """Calls over a framework that wraps what its actors raise."""

        def update_weights(self, _update_info: dict[str, Any]) -> dict[str, Any]:
            error = wt.ManifestMismatchError("It does not fit.")
            raise RuntimeError(f"ray::Worker.update() (pid=1)\nTraceback ...\nRuntimeError: {embed(error)}")

    receiver = wt.WeightReceiver(CONFIG, Small(9))
    sender = wt.WeightSender(CONFIG, [Actors(receiver)])
    with receiver, sender, pytest.raises(wt.ManifestMismatchError, match=r"It does not fit\.$") as caught:
        sender.send(Small(1))
    assert (caught.value.peer, caught.value.phase) == ("worker 0", "update")
