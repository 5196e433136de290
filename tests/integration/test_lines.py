"""One connection for all calls to a worker: what goes over it, who may open it, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

import weight_transfer as wt
from support.models import Small, digest
from weight_transfer.control import HttpChannel, create_app, serve
from weight_transfer.control.http_server import Server
from weight_transfer.control.line import framed
from weight_transfer.testing.actors import eventually

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

pytestmark = pytest.mark.timeout(60)

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)
PLAIN = ["status", "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]


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
