"""The HTTP control channel as a stranger sees it: routes, tokens, and one clear sentence for every bad request."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.control import HttpChannel, serve
from weight_transfer.testing.actors import eventually

if TYPE_CHECKING:
    from starlette.requests import Request

CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver(CONFIG, Odd(1)) as receiver:
        yield receiver


@pytest.fixture
def client(receiver: wt.WeightReceiver) -> Iterator[httpx.Client]:
    with serve(receiver) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        yield client


def _error(response: httpx.Response) -> dict[str, str]:
    error: dict[str, str] = response.json()["error"]
    return error


def _serves(receiver: wt.WeightReceiver, version: int) -> bool:
    return receiver.version == version


def _status(url: str, token: str | None = None) -> dict[str, Any]:
    with HttpChannel(url, token=token) as channel:
        status: dict[str, Any] = channel.status()
        return status


def test_the_routes_are_those_of_vllm_and_a_few_more(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"ok": True}
    status = client.get("/status").json()
    assert len(status.pop("id")) == 16
    assert status.pop("versions") == {"model": None}
    assert status.pop("digests") == {}
    assert status.pop("line") is True
    assert [status.pop(key) for key in ("committed", "updates", "prepared", "lease", "progress")] == [
        {},
        {},
        None,
        None,
        None,
    ]
    assert status == {
        "state": "created",
        "version": None,
        "published": None,
        "backend": "loopback",
        "device": "cpu",
        "workers": 1,
        "error": None,
    }
    routes = {
        "/init_weight_transfer_engine": {"init_info": {}},
        "/start_weight_update": {},
        "/update_weights": {"update_info": {}},
        "/finish_weight_update": {"weight_version": "v1"},
        "/abort_weight_update": {"reason": "test"},
        "/weight_needs": {"request": {}},
    }
    for route, body in routes.items():
        assert client.post(route, json=body).status_code in (204, 400, 409), route
    assert client.post("/no_such_route", json={}).status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "status", "kind", "words"),
    [
        ("/update_weights", b'{"update_info": {', 400, "ConfigError", "not valid JSON"),
        ("/update_weights", b"[" * 100_000, 400, "ConfigError", "not valid JSON"),
        ("/update_weights", b"[1, 2]", 400, "ConfigError", "must be a table"),
        ("/update_weights", b'{"update_inof": {}}', 400, "ConfigError", "did you mean 'update_info'?"),
        ("/finish_weight_update", b'{"weight_version": 1.5}', 400, "ConfigError", "weight_version"),
        ("/init_weight_transfer_engine", b'{"init_info": {"rank_offset": "1"}}', 400, "ConfigError", "rank_offset"),
        ("/update_weights", b'{"update_info": {}}', 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/finish_weight_update", b"{}", 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/start_weight_update", b"{}", 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/weight_needs", b'{"request": {}}', 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/weight_needs", b'{"request": []}', 400, "ConfigError", "request"),
    ],
)
def test_a_bad_request_gets_its_class_and_one_sentence_and_changes_nothing(
    client: httpx.Client, receiver: wt.WeightReceiver, route: str, body: bytes, status: int, kind: str, words: str
) -> None:
    response = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert _error(response)["type"] == kind
    assert words in _error(response)["message"]
    assert receiver.status()["state"] == "created"


def test_a_wrong_or_missing_token_is_refused_and_the_right_one_works(receiver: wt.WeightReceiver) -> None:
    with serve(receiver, token="right") as server:
        for token in (None, "wrong", "righ", "right!"):
            with pytest.raises(wt.HandshakeError, match="token is missing or wrong"):
                _status(server.url, token)
        assert _status(server.url, "right")["state"] == "created"
        assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200


def test_a_sender_with_a_wrong_token_says_so_at_once(receiver: wt.WeightReceiver) -> None:
    config = wt.load_config(CONFIG, token="wrong")
    with serve(receiver, token="right") as server, wt.WeightSender(config, [server.url]) as sender:
        with pytest.raises(wt.HandshakeError, match="token") as caught:
            sender.send(Odd(2))
        assert caught.value.peer == server.url


def test_a_model_is_not_served_by_itself() -> None:
    with pytest.raises(wt.ConfigError, match=r"got Odd; wrap a model: WeightReceiver\(config, model\)"):
        serve(Odd(2))  # type: ignore[arg-type]


def test_listening_beyond_loopback_demands_a_token(receiver: wt.WeightReceiver) -> None:
    with pytest.raises(wt.ConfigError, match="needs a token"):
        serve(receiver, host="0.0.0.0")
    with serve(receiver, host="0.0.0.0", token="secret"):
        pass


def test_a_port_that_is_taken_is_a_sentence(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server, pytest.raises(wt.ConfigError, match="Cannot listen on"):
        serve(receiver, port=int(server.url.rpartition(":")[2]))


def test_an_address_without_a_worker_is_a_lost_peer_within_the_deadline() -> None:
    sender = wt.WeightSender(wt.load_config(CONFIG, init_timeout=0.5), ["http://127.0.0.1:9"])
    with sender, pytest.raises(wt.PeerLostError, match="cannot be reached") as caught:
        sender.send(Odd(2))
    assert caught.value.peer == "http://127.0.0.1:9"


def test_an_address_of_some_other_server_is_a_handshake_error(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server:
        sender = wt.WeightSender(CONFIG, [f"{server.url}/elsewhere"])
        with sender, pytest.raises(wt.HandshakeError, match="is this the worker's URL") as caught:
            sender.send(Odd(2))
    assert (caught.value.peer, caught.value.phase) == (f"{server.url}/elsewhere", "init")


def test_two_workers_behind_one_address_both_get_every_bit() -> None:
    models = [Odd(1), Odd(2)]
    receivers = [
        wt.WeightReceiver(CONFIG, model, parallel_config=wt.ParallelConfig(rank=rank, world_size=2))
        for rank, model in enumerate(models)
    ]
    trainer = Odd(3)
    with serve(wt.LocalChannel(*receivers)) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        for version, seed in enumerate((4, 5, 4)):
            trainer.randomise(seed)
            sender.send(trainer, version=version)
            assert [digest(model) for model in models] == [digest(trainer)] * 2
        assert _status(server.url)["version"] == 2
    for receiver in receivers:
        receiver.close()


# Who may call: not what a browser does for a page of somebody else.

JSON = {"Content-Type": "application/json"}
ROUTES = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
FOREIGN = {
    "a page's form": (JSON | {"Content-Type": "text/plain"}, 415, "must be application/json, got text/plain"),
    "no content type": ({"Content-Type": ""}, 415, "must be application/json, got none"),
    "a page's script": (JSON | {"Origin": "http://evil.example"}, 403, "A web page of http://evil.example"),
    "a sandboxed page": (JSON | {"Origin": "null"}, 403, "A web page of null"),
    "another port's page": (JSON | {"Origin": "http://127.0.0.1:1"}, 403, "A web page of"),
}
REBOUND = {
    "a rebound name": (JSON | {"Host": "evil.example"}, 403, "This worker is not called 'evil.example'"),
    "a name like loopback": (JSON | {"Host": "localhost.evil.example:80"}, 403, "This worker is not called"),
    "a page of a rebound name": (JSON | {"Host": "e.com", "Origin": "http://e.com"}, 403, "This worker is not called"),
}


@pytest.mark.parametrize(
    ("foreign", "token"),  # with a token a server may have any name: no page knows the token
    [*((foreign, token) for foreign in FOREIGN for token in (None, "secret")), *((name, None) for name in REBOUND)],
)
def test_what_a_foreign_web_page_can_send_is_refused_before_anything_else(
    receiver: wt.WeightReceiver, token: str | None, foreign: str
) -> None:
    headers, status, words = (FOREIGN | REBOUND)[foreign]
    with serve(receiver, token=token) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        for route in [*ROUTES, "/abort_weight_update", "/begin_weight_update", "/line"]:
            response = client.post(route, content=b"not even JSON", headers=headers)
            assert response.status_code == status, route
            assert (_error(response)["type"], words in _error(response)["message"]) == ("HandshakeError", True)


def test_a_foreign_name_does_not_even_see_the_status(client: httpx.Client) -> None:
    assert client.get("/status", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/status", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/healthz", headers={"Host": "10.0.0.7:8001"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3:80", "[::1]:8001", "LOCALHOST:1"])
def test_loopback_has_many_names(client: httpx.Client, host: str) -> None:
    assert client.get("/status", headers={"Host": host}).status_code == 200


def test_a_page_of_the_server_itself_may_call(client: httpx.Client) -> None:
    own = str(client.base_url).rstrip("/")
    assert client.post("/start_weight_update", json={}, headers={"Origin": own}).status_code == 409
    json = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/start_weight_update", content=b"{}", headers=json).status_code == 409


def test_a_server_may_be_told_its_names(receiver: wt.WeightReceiver) -> None:
    with serve(receiver, token="secret", hosts=["Worker-3.cluster"]) as server:
        for host, status in {"worker-3.cluster:8001": 200, "127.0.0.1": 200, "worker-4.cluster": 403}.items():
            headers = {"Host": host, "Authorization": "Bearer secret"}
            assert httpx.get(f"{server.url}/status", headers=headers, trust_env=False).status_code == status
    with serve(receiver, token="secret") as server:
        headers = {"Host": "any.name", "Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/status", headers=headers, trust_env=False).status_code == 200


# Addresses that asking again cannot help.


@pytest.mark.parametrize("on_worker_failure", ["abort", "continue"])
def test_a_host_that_nobody_knows_fails_at_once(monkeypatch: pytest.MonkeyPatch, on_worker_failure: str) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    config = wt.load_config(CONFIG, init_timeout=60, on_worker_failure=on_worker_failure)
    since = time.monotonic()
    sender = wt.WeightSender(config, ["http://no-such-host.invalid:8001"])
    with sender, pytest.raises(wt.PeerLostError, match="nobody knows its host's name") as caught:
        sender.send(Odd(2))
    assert caught.value.permanent
    assert time.monotonic() - since < 10


def test_https_to_a_server_of_http_fails_at_once(receiver: wt.WeightReceiver) -> None:
    since = time.monotonic()
    with serve(receiver) as server:
        url = server.url.replace("http:", "https:")
        sender = wt.WeightSender(wt.load_config(CONFIG, init_timeout=60), [url])
        with sender, pytest.raises(wt.HandshakeError, match="is it an http:// address"):
            sender.send(Odd(2))
    assert time.monotonic() - since < 10


@pytest.mark.parametrize("init_timeout", [0.3, 1.5])
def test_a_host_that_swallows_connections_is_a_lost_peer(init_timeout: float) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        crowd = [socket.socket() for _ in range(4)]
        for client in crowd:  # they fill the backlog, so that the kernel answers no further one
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        config = wt.load_config(CONFIG, init_timeout=init_timeout)
        sender = wt.WeightSender(config, [f"http://127.0.0.1:{port}"])
        with sender, pytest.raises(wt.PeerLostError, match="cannot be reached"):
            sender.send(Odd(2), version=1)
        for client in crowd:
            client.close()


# Closed connections, and the server's end.


@pytest.mark.parametrize("replica", [False, True])
def test_a_closed_connection_ends_a_start_that_waits_and_the_old_version_is_served(replica: bool) -> None:
    receivers = [
        wt.WeightReceiver(CONFIG, Odd(1), parallel_config=wt.ParallelConfig(rank=rank, world_size=2))
        for rank in range(2 if replica else 1)
    ]
    with serve(wt.LocalChannel(*receivers)) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        sender.send(Odd(2), version=1)
        session = receivers[0]._lifecycle.session
        with receivers[0].serving():
            url, patience = f"{server.url}/start_weight_update", httpx.Timeout(20, read=0.5)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json={"session": session}, timeout=patience, trust_env=False)
            for receiver in receivers:
                assert eventually(partial(_serves, receiver, 1), 5), "config.timeout is 20 s"
        sender.send(Odd(3), version=2)
    for receiver in receivers:
        assert receiver.version == 2
        receiver.close()


def test_a_trainer_that_is_gone_when_its_start_succeeds_has_started_nothing() -> None:
    gone, aborted = threading.Event(), threading.Event()

    class Sampled:
        """A worker whose samplers leave at the moment at which the trainer dies."""

        def start_weight_update(self, session: str | None = None) -> None:
            gone.wait(10)

        def abort_weight_update(self, reason: str = "", session: str | None = None) -> None:
            aborted.set()

        def __getattr__(self, name: str) -> Any:
            return lambda **_: None

    with serve(Sampled()) as server:  # type: ignore[arg-type]
        for _ in range(20):
            gone.clear()
            aborted.clear()
            url = httpx.URL(server.url)
            with socket.create_connection((url.host, url.port)) as client:
                head = f"POST /start_weight_update HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
                client.sendall(f'{head}Content-Length: 15\r\n\r\n{{"session":"s"}}'.encode())
                assert not gone.wait(0.05)
            gone.set()
            assert aborted.wait(5)


def test_a_server_says_what_it_is(receiver: wt.WeightReceiver) -> None:
    with serve(receiver) as server:
        assert repr(server) == f"<Server {server.url}>"
    assert repr(server) == f"<Server {server.url}, closed>"


def test_ctrl_c_ends_a_server_that_waits_quietly() -> None:
    script = """
import signal, torch, weight_transfer as wt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
with wt.WeightReceiver({"backend": "loopback"}, torch.nn.Linear(2, 2)) as receiver, wt.serve(receiver) as server:
    print("up", flush=True)
    server.wait()
print("closed", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("bare", [False, True])
def test_a_users_own_channel_without_sessions_works_behind_http(bare: bool) -> None:
    class Bare:
        """What an inference server has: vLLM's signatures, in front of its workers."""

        def __init__(self, receiver: wt.WeightReceiver) -> None:
            self._receiver = receiver

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
            return self._receiver.init_weight_transfer_engine(init_info)

        def start_weight_update(self) -> None:
            self._receiver.start_weight_update()

        def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
            return self._receiver.update_weights(update_info)

        def finish_weight_update(self, weight_version: int | str | None = None) -> None:
            self._receiver.finish_weight_update(weight_version)

    class Own(Bare):
        def status(self) -> dict[str, Any]:
            return self._receiver.status()

        def abort_weight_update(self, reason: str = "") -> None:
            self._receiver.abort_weight_update(reason)

    model = Odd(1)
    receiver = wt.WeightReceiver(CONFIG, model)
    own: Any = Bare(receiver) if bare else Own(receiver)
    with receiver, serve(own) as server, wt.WeightSender(CONFIG, [server.url]) as sender:
        for seed in (2, 3):
            sender.send(Odd(seed), version=seed)
            assert (receiver.version, digest(model)) == (seed, digest(Odd(seed)))


# Beside the routes of an application, whose threads all wait.


@pytest.mark.parametrize("how", ["threads", "tasks"])
def test_control_calls_go_on_while_more_requests_wait_than_the_application_has_threads(how: str) -> None:
    waiting = 120
    model = Odd(1)
    receiver = wt.WeightReceiver(CONFIG, model)
    inside = threading.Semaphore(0)

    def generate(_request: Request) -> JSONResponse:
        inside.release()
        with receiver.serving() as version:
            return JSONResponse({"version": version})

    async def agenerate(_request: Request) -> JSONResponse:
        inside.release()
        async with receiver.aserving() as version:
            return JSONResponse({"version": version})

    route = Route("/generate", generate if how == "threads" else agenerate)
    app = Starlette(routes=[route, Mount("/weights", wt.create_app(receiver))])
    server = wt.Server(app, "127.0.0.1", 0)
    answers: list[Any] = []

    def ask() -> None:
        answers.append(httpx.get(f"{server.url}/generate", timeout=60, trust_env=False).json()["version"])

    with server, receiver, wt.WeightSender(CONFIG, [f"{server.url}/weights"]) as sender:
        asking = [threading.Thread(target=ask, daemon=True) for _ in range(waiting)]
        for thread in asking:
            thread.start()
        for _ in range(40 if how == "threads" else waiting):  # Starlette has 40 threads; the others wait for one
            assert inside.acquire(timeout=30)
        since = time.monotonic()
        sender.send(Odd(2), version=7)
        assert time.monotonic() - since < 10, "its deadlines are longer"
        for thread in asking:
            thread.join(30)
    assert answers == [7] * waiting
    assert digest(model) == digest(Odd(2))
