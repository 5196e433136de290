"""The HTTP control channel as a stranger sees it: routes, tokens, and one clear sentence for every bad request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import weight_transfer as wt
from support.models import Odd, digest
from weight_transfer.control import HttpChannel, serve

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


def _status(url: str, token: str | None = None) -> dict[str, Any]:
    with HttpChannel(url, token=token) as channel:
        status: dict[str, Any] = channel.status()
        return status


def test_the_routes_are_those_of_vllm_and_a_few_more(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"ok": True}
    status = client.get("/status").json()
    assert len(status.pop("id")) == 16
    assert status == {"state": "created", "version": None, "backend": "loopback", "workers": 1, "error": None}
    routes = {
        "/init_weight_transfer_engine": {"init_info": {}},
        "/start_weight_update": {},
        "/update_weights": {"update_info": {}},
        "/finish_weight_update": {"weight_version": "v1"},
        "/abort_weight_update": {"reason": "test"},
    }
    for route, body in routes.items():
        assert client.post(route, json=body).status_code in (204, 400, 409), route
    assert client.post("/no_such_route", json={}).status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "status", "kind", "words"),
    [
        ("/update_weights", b'{"update_info": {', 400, "ConfigError", "not valid JSON"),
        ("/update_weights", b"[1, 2]", 400, "ConfigError", "must be a table"),
        ("/update_weights", b'{"update_inof": {}}', 400, "ConfigError", "did you mean 'update_info'?"),
        ("/finish_weight_update", b'{"weight_version": 1.5}', 400, "ConfigError", "weight_version"),
        ("/init_weight_transfer_engine", b'{"init_info": {"rank_offset": "1"}}', 400, "ConfigError", "rank_offset"),
        ("/update_weights", b'{"update_info": {}}', 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/finish_weight_update", b"{}", 409, "LifecycleError", "init_weight_transfer_engine first"),
        ("/start_weight_update", b"{}", 409, "LifecycleError", "init_weight_transfer_engine first"),
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
    with serve(receiver) as server, pytest.raises(wt.HandshakeError, match="is this the worker's URL"):
        _status(f"{server.url}/elsewhere")


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
