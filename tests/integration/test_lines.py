"""One connection for all calls to a worker: what goes over it, who may open it, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
import uvicorn
from torch import nn

import weight_transfer as wt
from support.models import Odd, Small, digest
from weight_transfer.control import HttpChannel, create_app, serve
from weight_transfer.control.http_server import Server
from weight_transfer.control.line import framed
from weight_transfer.testing.actors import eventually

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

pytestmark = pytest.mark.timeout(60)

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)
PLAIN = ["status", "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]


class Many(nn.Module):
    """As many weights as make a trainer say that an update is about to start."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(600):
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(3), requires_grad=False))

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(3, generator=generator))


class Listed:
    """An app that takes down which routes were asked for, and has none of those that it ``lacks``."""

    def __init__(self, app: ASGIApp, lacks: str = "") -> None:
        self.asked: list[str] = []
        self._app = app
        self._lacks = lacks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.asked.append(scope["path"][1:])
            if self.asked[-1] == self._lacks:
                scope = {**scope, "path": "/nothing"}
        await self._app(scope, receive, send)


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver(CONFIG, Small(1)) as receiver:
        yield receiver


@contextmanager
def other_server(app: ASGIApp) -> Iterator[str]:
    """Serve an app by uvicorn itself, as an inference server does."""
    config = uvicorn.Config(app, log_level="warning", interface="asgi3", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        assert eventually(lambda: server.started, 20)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "a line keeps the server from ending"


def test_all_calls_go_over_one_connection_once_the_status_has_offered_it(receiver: wt.WeightReceiver) -> None:
    model = Small(2)
    app = Listed(create_app(receiver))
    with Server(app, "127.0.0.1", 0) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        for version, seed in enumerate((2, 3, 2, 3)):
            model.randomise(seed)
            sender.send(model)
            assert (receiver.version, receiver.status()["state"]) == (version, "ready")
    assert app.asked == ["status", "line"]


def test_a_server_of_somebody_else_offers_no_line_and_gets_every_bit() -> None:
    model = Small(1)
    with wt.WeightReceiver(CONFIG, model) as own:
        app = Listed(create_app(own))
        with other_server(app) as url, wt.WeightSender(CONFIG, [url]) as sender:
            for seed in (2, 3, 2):
                sender.send(Small(seed))
                assert digest(model) == digest(Small(seed))
            assert httpx.get(f"{url}/status", trust_env=False).json()["line"] is False
            assert httpx.post(f"{url}/line", json={}, trust_env=False).status_code == 404
    assert app.asked == [*PLAIN, *PLAIN[2:], *PLAIN[2:], "status", "line"]


def test_a_line_that_is_offered_and_not_opened_is_told_and_done_without(
    receiver: wt.WeightReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    app = Listed(create_app(receiver), lacks="line")
    with Server(app, "127.0.0.1", 0) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        for version in range(2):
            sender.send(Small(2))
            assert receiver.version == version
    assert app.asked == ["status", "line", *PLAIN[1:], *PLAIN[2:]]
    (told,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "offers a line but opens none" in told and "HTTP status 404" in told


def test_a_proxy_that_holds_a_line_back_is_told_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/line":
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            await app(scope, receive, send)

    channel: Any = Scripted()
    app = create_app(channel)
    with Server(proxy, "127.0.0.1", 0) as server, HttpChannel(server.url, connect_timeout=0.2) as http:
        http.status()
        http.start_weight_update("s")
        http.start_weight_update("s")
    assert channel.calls == [("start", "s")] * 2
    (told,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "offers a line but opens none" in told and "said nothing within 0.2 s" in told


@pytest.mark.parametrize("sent", [b"not JSON", b"[]", b'{"id": 1}', b'{"id": 1, "call": "status", "body": 5}'])
def test_what_is_no_call_ends_the_line_and_nothing_else(receiver: wt.WeightReceiver, sent: bytes) -> None:
    with serve(receiver) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), 10) as line:
            line.sendall(
                b"POST /line HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(sent) + 1, sent + b"\n")
            )
            heard = b""
            while chunk := line.recv(4096):
                heard += chunk
                if heard.endswith(b"0\r\n\r\n"):
                    break
        assert b'{"line":2}' in heard
        assert httpx.get(f"{server.url}/status", trust_env=False).json()["state"] == "created"


def connected(url: str) -> socket.socket:
    return socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), 10)


@contextmanager
def line_to(url: str) -> Iterator[socket.socket]:
    """Open a line by hand, up to the server's first word."""
    with connected(url) as line:
        line.sendall(
            b"POST /line HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        hear(line, b'{"line":2}\n\r\n')
        yield line


def hear(line: socket.socket, *words: bytes) -> bytes:
    """Return what comes, up to the last of some words."""
    heard = b""
    while not all(word in heard for word in words):
        chunk = line.recv(4096)
        assert chunk, f"the line ended after {heard!r}"
        heard += chunk
    return heard


def test_calls_come_in_any_pieces_and_several_at_once() -> None:
    channel: Any = Scripted()
    first, second = (b'{"id":%d,"call":"start_weight_update","body":{"session":"s%d"}}' % (i, i) for i in (1, 2))
    with serve(channel) as server, line_to(server.url) as line:
        sent = framed(first + b"\n" + second)  # two calls in one chunk
        line.sendall(sent)
        hear(line, b'"id":1,', b'"id":2,')
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(len(sent)):  # and each byte by itself
            line.sendall(sent[number : number + 1])
        hear(line, b'"id":1,', b'"id":2,')
        # Before the line is closed: a server may abort once more what it answered a moment before.
        assert sorted(channel.calls) == [("start", "s1")] * 2 + [("start", "s2")] * 2


def test_a_request_that_ends_ends_its_line_and_has_its_update_aborted() -> None:
    channel: Any = Scripted()
    with serve(channel) as server, line_to(server.url) as line:
        line.sendall(
            framed(b'{"id":1,"call":"begin_weight_update","body":{"update_info":{"timeout":9,"session":"s"}}}')
        )
        assert channel.entered.wait(20)
        line.sendall(b"0\r\n\r\n")
        assert channel.aborted.wait(20)
        hear(line, b"0\r\n\r\n")


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
def test_what_follows_a_request_without_a_body_is_no_call(length: bytes) -> None:
    channel: Any = Scripted()
    with serve(channel) as server, connected(server.url) as line:
        head = b"POST /line HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(head + length + b"\r\n")
        hear(line, b"0\r\n\r\n")
        with suppress(ConnectionError):  # it has ended
            line.sendall(framed(b'{"id":1,"call":"start_weight_update","body":{"session":"s"}}'))
            assert line.recv(4096) == b""
    assert channel.calls == []


def test_calls_without_an_id_count_and_take_no_turn_from_an_abort() -> None:
    """One that takes long after all is overtaken, as any other call is."""
    channel: Any = Scripted()
    channel.expect_weight_update = lambda session: channel.aborted.wait(20)
    with serve(channel) as server, line_to(server.url) as line:
        line.sendall(framed(b'{"call":"expect_weight_update","body":{"session":"s"}}'))
        line.sendall(framed(b'{"id":1,"call":"abort_weight_update","body":{"session":"s"}}'))
        hear(line, b'"id":1,')
        channel.aborted.clear()
        line.sendall(framed(b'{"call":"expect_weight_update","body":{"session":"s"}}') * 257)
        hear(line, b"0\r\n\r\n")
        channel.aborted.set()


def test_a_call_without_an_id_has_no_answer_and_takes_no_time() -> None:
    """Whoever reads makes it himself: one that takes long is none of those, and ends the line."""
    channel: Any = Scripted()
    channel.expect_weight_update = lambda session: channel.calls.append(("expect", session))
    with serve(channel) as server, line_to(server.url) as line:
        line.sendall(framed(b'{"call":"expect_weight_update","body":{"session":"s"}}'))
        line.sendall(framed(b'{"id":3,"call":"start_weight_update","body":{"session":"s"}}'))
        assert hear(line, b'"id":3,').count(b'"status"') == 1
        line.sendall(framed(b'{"call":"update_weights","body":{"update_info":{"session":"s"}}}'))
        hear(line, b"0\r\n\r\n")
    assert channel.calls == [("expect", "s"), ("start", "s")]


def test_lines_leave_neither_threads_nor_files() -> None:
    channel: Any = Scripted()
    with serve(channel) as server:
        threads, files = threading.active_count(), open_files()
        for _ in range(20):
            with line_to(server.url) as line:
                line.sendall(framed(b'{"id":1,"call":"status","body":{}}'))
                hear(line, b'"id":1,')
        assert eventually(lambda: open_files() <= files, 20)
        assert threading.active_count() <= threads + 2  # that wait for calls, for some seconds more


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_unknown_call_over_a_line_is_answered_as_an_unknown_route(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server, HttpChannel(server.url) as channel:
        channel.status()
        with pytest.raises(wt.HandshakeError, match="/sing answered with HTTP status 404"):
            channel.submit("sing").result(20)


def test_a_message_may_be_larger_than_any_buffer(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server, HttpChannel(server.url) as channel:
        channel.status()
        with pytest.raises(wt.ConfigError, match="unknown key") as caught:
            channel.init_weight_transfer_engine(
                {"rank_offset": 1, "world_size": 2, "timeout": 5, "endpoint": "é" * 2**22, "x": 1}
            )
        assert "'x'" in str(caught.value)


class Scripted:
    """A channel whose update waits until it is aborted."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.entered, self.aborted = threading.Event(), threading.Event()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")

    def start_weight_update(self, session: str | None = None) -> None:
        self.calls.append(("start", session))

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(("update", update_info["session"]))
        self.entered.set()
        assert self.aborted.wait(20)
        raise wt.TransferError("It was aborted.")

    def finish_weight_update(self, weight_version: int | str | None = None, session: str | None = None) -> object:
        return {1, 2} if weight_version == "odd" else None

    def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
        self.calls.append(("abort", reason, session))
        self.aborted.set()

    def status(self) -> dict[str, Any]:
        return {}


BEGIN = {"timeout": 20, "session": "s"}


def test_an_abort_overtakes_the_update_on_the_same_line() -> None:
    channel: Any = Scripted()
    with serve(channel) as server, HttpChannel(server.url) as http:
        http.status()
        running = http.submit("begin_weight_update", update_info=BEGIN)
        assert channel.entered.wait(20)
        http.abort_weight_update("enough", "s")
        with pytest.raises(wt.TransferError, match=r"It was aborted\.$"):
            running.result(20)
        # Before the line is closed: a server may abort once more what it answered a moment before.
        assert channel.calls == [("start", "s"), ("update", "s"), ("abort", "enough", "s")]


def test_whoever_leaves_while_an_update_runs_has_it_aborted() -> None:
    channel: Any = Scripted()
    with serve(channel) as server:
        with HttpChannel(server.url) as http:
            http.status()
            running = http.submit("begin_weight_update", update_info=BEGIN)
            assert channel.entered.wait(20)
        with pytest.raises(wt.PeerLostError, match="went away"):
            running.result(20)
        assert channel.aborted.wait(20)
    assert channel.calls[2:] == [("abort", "the trainer closed its connection", "s")]


def test_the_end_of_the_server_ends_its_lines_at_once() -> None:
    channel: Any = Scripted()
    with HttpChannel((server := serve(channel)).url) as http:
        http.status()
        http.init_weight_transfer_engine({})
        since = time.monotonic()
        server.close()
        assert time.monotonic() - since < 2
        with pytest.raises(wt.PeerLostError, match="cannot be reached"):
            http.start_weight_update()


def test_a_call_that_is_not_answered_in_time_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.control.http_client._MARGIN", 0.1)
    channel: Any = Scripted()
    with serve(channel) as server, HttpChannel(server.url) as http:
        http.status()
        with pytest.raises(wt.TransferTimeoutError, match=r"did not answer /update_weights within 0\.2 s") as caught:
            http.update_weights({"timeout": 0.1, "session": "s"})
        assert (caught.value.peer, caught.value.phase) == (server.url, "update")
        channel.aborted.set()
        http.finish_weight_update(1)


def test_an_answer_that_is_not_json_is_a_sentence() -> None:
    channel: Any = Scripted()
    with serve(channel) as server, HttpChannel(server.url) as http:
        http.status()
        with pytest.raises(wt.TransferError, match=r"The answer to /finish_weight_update is not JSON-safe\."):
            http.finish_weight_update("odd")


def test_the_thread_of_the_channels_ends_with_the_last_of_them(receiver: wt.WeightReceiver) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "weight-transfer channels"]

    with serve(receiver) as server:
        with HttpChannel(server.url) as one:
            one.status()
            with HttpChannel(server.url) as other:
                other.status()
                assert len(threads()) == 1
            one.status()
        assert not threads()
        with one:  # it may be used again
            assert one.status()["state"] == "created"


def test_a_trainer_needs_no_thread_for_each_worker() -> None:
    def calling() -> int:
        return sum(thread.name == "weight-transfer call" for thread in threading.enumerate())

    together, before = threading.Barrier(16), calling()
    counted: list[int] = []

    class Meeting(wt.WeightReceiver):
        def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
            together.wait(20)
            counted.append(calling())
            return super().update_weights(update_info)

    with ExitStack() as stack:
        receivers = [stack.enter_context(Meeting(CONFIG, Small(seed))) for seed in range(16)]
        urls = [stack.enter_context(serve(receiver)).url for receiver in receivers]
        with wt.WeightSender(CONFIG, urls) as sender:
            sender.send(Small(1), version=1)
    assert max(counted) <= before


@pytest.mark.parametrize(
    ("place", "method"),
    [
        ("submit", "start_weight_update"),
        ("submit", "begin_weight_update"),
        ("submit", "finish_weight_update"),
        ("_result", "begin_weight_update"),
        ("_result", "finish_weight_update"),
    ],
)
def test_ctrl_c_in_a_call_is_the_callers_and_no_failure_of_a_worker(
    place: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the caller's thread writes a call, or reads an answer: some it reads, others the event loop does.

    With "continue" the worker would be left behind.
    """
    config = wt.load_config(CONFIG, backend="ipc", on_worker_failure="continue")
    model, own = Small(1), getattr(HttpChannel, place)
    caller = threading.current_thread()

    def interrupted(self: HttpChannel, call: Any, *arguments: Any, **fields: Any) -> Any:
        if method == getattr(call, "method", call) and threading.current_thread() is caller:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return own(self, call, *arguments, **fields)

    with (
        wt.WeightReceiver(config, model) as receiver,
        serve(receiver) as server,
        wt.WeightSender(config, [server.url]) as sender,
    ):
        for seed in range(0 if method == "start_weight_update" else 2):
            sender.send(Small(seed))
        monkeypatch.setattr(HttpChannel, place, interrupted)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            for seed in range(1000):  # by far most of them are the caller's, on a machine that is not busy
                sender.send(Small(seed))
        sender.send(Small(3))
        assert digest(model) == digest(Small(3))


# Start and update in one call.


@pytest.fixture
def workers() -> Iterator[list[wt.WeightReceiver]]:
    receivers = [wt.WeightReceiver(CONFIG, Small(seed)) for seed in (1, 2)]
    yield receivers
    for each in receivers:
        each.close()


class Fleet:
    """Two workers over HTTP, and the channels to them."""

    def __init__(self, stack: ExitStack, config: wt.WeightTransferConfig) -> None:
        self.trainer = Small(0)
        self.models = [Small(seed) for seed in (1, 2)]
        self.receivers = [stack.enter_context(wt.WeightReceiver(config, model)) for model in self.models]
        self.servers = [stack.enter_context(serve(receiver)) for receiver in self.receivers]
        self.channels = [stack.enter_context(HttpChannel(server.url)) for server in self.servers]
        self.calls: list[str] = []
        for channel in self.channels:
            self._list(channel)
        self.sender = stack.enter_context(wt.WeightSender(config, self.channels))

    def _list(self, channel: HttpChannel) -> None:
        submit = channel.submit

        def listed(method: str, **arguments: Any) -> Any:
            self.calls.append(method)
            return submit(method, **arguments)

        channel.submit = listed  # type: ignore[method-assign]

    def send(self, seed: int, version: int) -> list[str]:
        """Send; see that both have every bit, and return what was called, each method once."""
        self.calls.clear()
        self.trainer.randomise(seed)
        self.sender.send(self.trainer, version=version)
        assert [receiver.version for receiver in self.receivers] == [version] * 2
        assert [digest(model) for model in self.models] == [digest(self.trainer)] * 2
        return list(dict.fromkeys(self.calls))


@pytest.fixture(params=["loopback", "ipc"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, wt.load_config(CONFIG, backend=request.param))


SLOWLY = ["start_weight_update", "update_weights", "finish_weight_update"]
AT_ONCE = ["begin_weight_update", "finish_weight_update"]
Twice = Callable[[Fleet], None]


def warm_up(fleet: Fleet) -> None:
    for version in range(2):
        assert fleet.send(version, version)[-3:] == SLOWLY
    assert fleet.send(3, 2) == AT_ONCE


def test_once_workers_are_known_to_wait_for_nobody_an_update_begins_with_one_call(fleet: Fleet) -> None:
    warm_up(fleet)
    for version, seed in enumerate((1, 2, 1), 3):
        assert fleet.send(seed, version) == AT_ONCE


def replaced(model: nn.Module, number: int) -> None:
    """Put another parameter into the place of one."""
    setattr(model, f"w{number}", nn.Parameter(torch.zeros(3), requires_grad=False))


def moved(model: nn.Module, number: int) -> None:
    getattr(model, f"w{number}").data = torch.zeros(3)


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("change", [replaced, moved])
def test_workers_look_at_many_weights_while_the_trainer_does_and_see_each_change(
    change: Callable[[nn.Module, int], None], declares: bool
) -> None:
    """A, a change of the model, B, A: what was seen in advance counts for the update that follows alone."""
    trainer, model = Many(), Many()

    def needs(manifest: wt.Manifest) -> dict[str, wt.Target]:
        return {name: wt.Target(wt.Region.whole((3,)), getattr(model, name)) for name in ("w0", "w7")}

    with (
        wt.WeightReceiver(CONFIG, model, needs=needs if declares else None) as receiver,
        serve(receiver) as server,
        HttpChannel(server.url) as channel,
        wt.WeightSender(CONFIG, [channel]) as sender,
    ):
        expected: list[object] = []
        expect = channel.expect_weight_update

        def listed(session: str | None = None) -> Any:
            expected.append(session)
            return expect(session)

        channel.expect_weight_update = listed  # type: ignore[method-assign]
        for seed in (1, 2, 1):
            trainer.randomise(seed)
            sender.send(trainer)
            assert digest(model) == digest(trainer)
            change(model, 7)
            change(model, 40)
        assert len(expected) == 2


def test_workers_whose_version_somebody_holds_are_asked_to_start(fleet: Fleet) -> None:
    warm_up(fleet)
    with fleet.receivers[1].serving():
        assert eventually(lambda: not fleet.channels[1].begins, 20)
    assert fleet.send(4, 4) == SLOWLY


def test_a_worker_that_has_joined_another_trainer_refuses_and_keeps_its_version(fleet: Fleet) -> None:
    warm_up(fleet)
    with wt.WeightSender(wt.load_config(CONFIG, backend=fleet.sender.config.backend), [fleet.receivers[1]]) as other:
        other.send(Small(8), version=8)
    with pytest.raises(wt.ReplacedError):
        fleet.send(4, 9)
    assert fleet.calls[0] == "begin_weight_update"
    assert (fleet.receivers[1].version, digest(fleet.models[1])) == (8, digest(Small(8)))


def test_a_worker_that_has_left_refuses_and_all_get_the_version(fleet: Fleet) -> None:
    warm_up(fleet)
    fleet.receivers[1].leave()
    called = fleet.send(4, 4)
    assert called[0] == "begin_weight_update"
    assert called[1:4] == ["abort_weight_update", "status", "init_weight_transfer_engine"]
    assert called[-3:] == ["start_weight_update", "update_weights", "finish_weight_update"] or set(SLOWLY) < set(called)
    fleet.send(5, 5)


def test_a_worker_whose_server_was_started_anew_is_asked_to_start_before_others_are_touched(fleet: Fleet) -> None:
    warm_up(fleet)
    url = httpx.URL(fleet.servers[0].url)
    fleet.servers[0].close()
    assert eventually(lambda: not fleet.channels[0].begins, 20)
    with serve(fleet.receivers[0], port=url.port or 0):
        assert "begin_weight_update" not in fleet.send(4, 4)


def test_a_failure_after_the_start_is_one_of_the_update(fleet: Fleet) -> None:
    warm_up(fleet)
    fleet.calls.clear()
    with pytest.raises(wt.ManifestMismatchError) as caught:
        fleet.sender.send(Odd(4, rows=8, width=8), version=4)
    assert fleet.calls[:2] == ["begin_weight_update"] * 2 or "weight_needs" in fleet.calls
    assert caught.value.peer in [server.url for server in fleet.servers]
    assert [receiver.version for receiver in fleet.receivers] == [2, 2]
    fleet.send(5, 5)


def test_samplers_that_come_between_are_waited_for_and_named_with_the_phase() -> None:
    config = wt.load_config(CONFIG, timeout=2)
    model = Small(1)
    with ExitStack() as stack:
        receiver = stack.enter_context(wt.WeightReceiver(config, model))
        server = stack.enter_context(serve(receiver))
        channel = stack.enter_context(HttpChannel(server.url))
        sender = stack.enter_context(wt.WeightSender(config, [channel]))
        for version in range(2):
            sender.send(Small(2), version=version)
        with receiver.serving():
            pass  # from here on the line says so, and that is overlooked
        assert eventually(lambda: not channel.begins, 20)
        assert channel._line is not None
        channel._line.waits = False
        with receiver.serving(), pytest.raises(wt.TransferTimeoutError, match="still in serving") as caught:
            sender.send(Small(3), version=3)
        assert (caught.value.phase, caught.value.peer) == ("start", server.url)
        assert (receiver.version, digest(model)) == (1, digest(Small(2)))
        sender.send(Small(3), version=3)
        assert (receiver.version, digest(model)) == (3, digest(Small(3)))
