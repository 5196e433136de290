"""What a worker's HTTP server does not take, and how little of it reaches whoever may call."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.control import HttpChannel, HttpLimits, Server, create_app, serve
from weight_transfer.testing.actors import eventually

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)
HEAD = b"POST /abort_weight_update HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT = HttpLimits(stranger_seconds=0.4, connections=8, body_bytes=1000, body_seconds=0.4, header_bytes=4096)

Connect = Callable[[], socket.socket]


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver(CONFIG, Odd(1)) as receiver:
        yield receiver


@pytest.fixture
def server(receiver: wt.WeightReceiver) -> Iterator[Server]:
    with serve(receiver, limits=SHORT) as server:
        yield server


def connector(stack: ExitStack, server: Server) -> Connect:
    url = httpx.URL(server.url)
    return lambda: stack.enter_context(socket.create_connection((url.host, url.port), 10))


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    with ExitStack() as stack:
        yield connector(stack, server)


def heard(line: socket.socket) -> bytes:
    """Return everything until the other end closes the connection."""
    data = b""
    try:
        while chunk := line.recv(2**16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False, timeout=10)


def posted(server: Server, route: str, body: object) -> httpx.Response:
    """Send what httpx itself would refuse to write, too."""
    content, json_type = json.dumps(body), {"Content-Type": "application/json"}
    return httpx.post(f"{server.url}/{route}", content=content, headers=json_type, trust_env=False)


# Bodies.


@pytest.mark.parametrize("announced", [b"1001", b"9" * 18])
def test_a_body_that_is_announced_as_too_long_is_refused_before_it_comes(connect: Connect, announced: bytes) -> None:
    line = connect()
    line.sendall(HEAD + b"Content-Length: " + announced + b"\r\n\r\n")
    answer = heard(line)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"at most 1000 bytes here" in answer


def test_a_body_without_a_length_is_refused_at_the_limit(server: Server, connect: Connect) -> None:
    line = connect()
    line.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"64\r\n" + b"x" * 100 + b"\r\n") * 11)
    assert heard(line).startswith(b"HTTP/1.1 413 ")
    body = {"reason": "x" * 900}
    assert httpx.post(f"{server.url}/abort_weight_update", json=body, trust_env=False).status_code == 204


def test_a_body_that_does_not_come_is_given_up(connect: Connect) -> None:
    line = connect()
    since = time.monotonic()
    line.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert heard(line).startswith(b"HTTP/1.1 408 ")
    assert 0.3 < time.monotonic() - since < 5


def test_whoever_leaves_in_the_middle_of_a_body_leaves_no_traceback(
    server: Server, connect: Connect, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    line = connect()
    line.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    time.sleep(0.05)  # else the server may not have begun
    line.close()
    assert get(f"{server.url}/status").status_code == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_call_over_a_line_has_the_same_limit(server: Server) -> None:
    with HttpChannel(server.url) as channel:
        channel.status()
        channel.abort_weight_update("x" * 900)
        with pytest.raises(wt.PeerLostError, match="went away"):
            channel.abort_weight_update("x" * 2000)
        assert channel.status()["state"] == "created"


def test_a_line_on_which_nobody_reads_answers_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.control.line_server._GOODBYE", 0.1)
    url = httpx.URL(server.url)
    with socket.socket() as line:
        line.settimeout(10)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # a window that shrinks later may stall both ends
        line.connect((url.host, url.port))
        line.sendall(HEAD.replace(b"abort_weight_update", b"line") + b"Transfer-Encoding: chunked\r\n\r\n")
        call = json.dumps({"id": "i" * 700, "call": "status", "body": {}}).encode() + b"\n"
        chunk = b"%x\r\n%b\r\n" % (len(call), call)
        with pytest.raises(ConnectionError):  # noqa: PT012  (the loop is what raises)
            while True:
                line.sendall(chunk)


@pytest.mark.parametrize(
    "said",
    [
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n",
        HEAD.replace(b"abort_weight_update", b"line") + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Content-Length: 2\r\n\r\n{}zz\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=range(5),
)
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_what_becomes_no_http_in_the_middle_leaves_no_traceback(
    connect: Connect, caplog: pytest.LogCaptureFixture, said: bytes, pause: float
) -> None:
    line = connect()
    head, _, rest = said.partition(b"\r\n\r\n")
    line.sendall(head + b"\r\n\r\n")
    time.sleep(pause)  # the answer may have begun, or not
    line.sendall(rest)
    line.shutdown(socket.SHUT_WR)
    heard(line)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


# Connections.


def test_silent_strangers_are_closed_soon(connect: Connect) -> None:
    since = time.monotonic()
    lines = [connect() for _ in range(5)]
    assert [heard(line) for line in lines] == [b""] * 5
    assert 0.3 < time.monotonic() - since < 5


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_heads_do_not_trickle_for_ever(connect: Connect, end: bytes) -> None:
    """What is no route of this worker's makes nobody known either."""
    line = connect()
    since = time.monotonic()
    line.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nX: " + end)
    with pytest.raises(ConnectionError):  # noqa: PT012  (the loop is what raises)
        while time.monotonic() - since < 10:
            line.sendall(b"x")
            time.sleep(0.02)
    assert time.monotonic() - since < 5


def test_a_head_has_an_end(connect: Connect) -> None:
    line = connect()
    line.sendall(b"GET /status HTTP/1.1\r\nX: " + b"x" * 10_000)
    assert heard(line).startswith(b"HTTP/1.1 400 ")


def test_more_strangers_than_there_may_be_connections_keep_nobody_out(
    receiver: wt.WeightReceiver, server: Server, connect: Connect
) -> None:
    with wt.WeightSender(CONFIG, [server.url]) as sender, HttpChannel(server.url) as other:
        sender.send(Odd(2), version=2)
        for _ in range(100):
            connect()
        sender.send(Odd(3), version=3)
        assert other.status()["version"] == 3
        for _ in range(100):
            connect().sendall(b"GET /status HTTP/1.1\r\n")
        sender.send(Odd(2), version=4)
        assert receiver.version == 4


def test_all_of_a_flood_are_closed(connect: Connect) -> None:
    since = time.monotonic()
    lines = [connect() for _ in range(300)]
    assert {heard(line) for line in lines} == {b""}
    assert time.monotonic() - since < 8


def test_whoever_lacks_the_token_is_closed_before_who_has_it(receiver: wt.WeightReceiver) -> None:
    with serve(receiver, token="right", limits=SHORT) as server, ExitStack() as stack:
        connect = connector(stack, server)
        ours = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer right"}, trust_env=False)
        assert stack.enter_context(ours).get("/status").status_code == 200
        strangers = [connect() for _ in range(20)]
        for line in strangers[-4:]:
            line.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n")
        refused = [heard(line) for line in strangers[-4:]]
        assert all(answer.startswith(b"HTTP/1.1 401 ") for answer in refused)
        (kept,) = ours._transport._pool.connections  # type: ignore[attr-defined]
        assert ours.get("/status").status_code == 200
        assert ours._transport._pool.connections == [kept]  # type: ignore[attr-defined]


def test_a_request_that_is_being_answered_is_let_end(receiver: wt.WeightReceiver) -> None:
    async def slow(_request: object) -> JSONResponse:
        await asyncio.sleep(3 * SHORT.stranger_seconds)
        return JSONResponse({"slow": True})

    app = Starlette(routes=[Route("/slow", slow), *create_app(receiver).routes])
    with Server(app, "127.0.0.1", 0, limits=SHORT) as server:
        assert get(f"{server.url}/slow").json() == {"slow": True}


def test_a_server_ends_at_once_whoever_is_connected(receiver: wt.WeightReceiver) -> None:
    with ExitStack() as stack:
        server = serve(receiver)
        connect = connector(stack, server)
        lines = [connect() for _ in range(5)]
        assert get(f"{server.url}/healthz").status_code == 200
        since = time.monotonic()
        server.close()
        assert time.monotonic() - since < 2
        assert [heard(line) for line in lines] == [b""] * 5


# Fields.


@pytest.mark.parametrize("timeout", [1e300, 10**400, -1, 0, "1", True, [], float("nan")], ids=str)
def test_seconds_are_checked_before_a_worker_sees_them(server: Server, timeout: Any) -> None:
    for route in ("init_weight_transfer_engine", "update_weights", "begin_weight_update"):
        field = "init_info" if route.startswith("init") else "update_info"
        answer = posted(server, route, {field: {"timeout": timeout}})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "ConfigError")
        assert f"{field} of /{route}: timeout: expected" in answer.json()["error"]["message"]


@pytest.mark.parametrize("session", ["x" * 257, "\ud800", "a\nb", "\0", 5, {}, True])
def test_sessions_are_short_printable_texts(server: Server, session: Any) -> None:
    for route, body in (
        ("start_weight_update", {"session": session}),
        ("finish_weight_update", {"session": session}),
        ("abort_weight_update", {"session": session}),
        ("init_weight_transfer_engine", {"init_info": {"session": session}}),
        ("begin_weight_update", {"update_info": {"session": session}}),
        ("weight_needs", {"request": {"session": session}}),
    ):
        answer = posted(server, route, body)
        assert (answer.status_code, "session" in answer.json()["error"]["message"]) == (400, True), route
    assert get(f"{server.url}/status").json()["state"] == "created"


def test_a_long_reason_is_kept_short_and_then_told(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        sender.send(Odd(2), version=1)
        session = receiver._lifecycle.session
        receiver.start_weight_update(session)
        body = {"reason": "x" * 10**6, "session": session}
        assert httpx.post(f"{server.url}/abort_weight_update", json=body, trust_env=False).status_code == 204
        assert len(get(f"{server.url}/status").text) < 2000
        sender.send(Odd(3), version=2)
        assert receiver.version == 2


# Who may call.


def test_every_route_but_healthz_asks_for_the_token_and_none_answers_a_preflight(receiver: wt.WeightReceiver) -> None:
    app = create_app(receiver, token="right")
    routes = {route.path: route.methods for route in app.routes if isinstance(route, Route)}
    with Server(app, "127.0.0.1", 0) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        for path, methods in routes.items():
            for method in methods or ():
                answer = client.request(method, path, headers={"Content-Type": "application/json"}, content=b"{}")
                assert answer.status_code == (200 if path == "/healthz" else 401), path
            asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
            answer = client.options(path, headers=asked)
            assert answer.status_code == 405
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert len(routes) >= 10


@pytest.mark.parametrize(
    "limits", [{"connections": 0}, {"body_bytes": 0}, {"stranger_seconds": -1}, {"header_bytes": "x"}]
)
def test_limits_are_positive(limits: dict[str, Any]) -> None:
    with pytest.raises(wt.ConfigError, match=next(iter(limits))):
        HttpLimits(**limits)


def test_the_bits_are_those_of_an_undisturbed_worker(server: Server, connect: Connect) -> None:
    """A -> B -> A, among strangers of every kind."""
    model = Odd(1)
    with wt.WeightReceiver(CONFIG, model) as receiver, serve(receiver, limits=SHORT) as own, ExitStack() as stack:
        strange = connector(stack, own)
        with wt.WeightSender(CONFIG, [own.url]) as sender:
            for version, seed in enumerate((2, 3, 2)):
                for said in (b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", HEAD, HEAD + b"Content-Length: 99\r\n\r\n["):
                    strange().sendall(said)
                sender.send(Odd(seed), version=version)
                assert (receiver.version, digest(model)) == (version, digest(Odd(seed)))
    assert eventually(lambda: get(f"{server.url}/healthz").status_code == 200, 5)
