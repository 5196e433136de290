"""``weight-transfer status`` tells how workers are, and by its exit status whether all is well."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import nn

import weight_transfer as wt
from weight_transfer.cli import main

CONFIG = {"backend": "loopback", "timeout": 10}


def status(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["status", *arguments])


def told(*arguments: str) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = json.loads(status(*arguments, "--json").stdout)
    return workers


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver(CONFIG, nn.Linear(4, 2)) as receiver:
        yield receiver


def test_it_shows_state_version_and_age_of_each_worker(receiver: wt.WeightReceiver) -> None:
    with (
        wt.WeightReceiver(CONFIG, nn.Linear(4, 2)) as other,
        wt.serve(receiver) as one,
        wt.serve(other) as two,
        wt.WeightSender(CONFIG, [one.url]) as sender,
    ):
        sender.send(nn.Linear(4, 2), version=7)
        done = status(one.url, two.url)
        [ready, created] = told(one.url, two.url)
    assert done.exit_code == 0
    header, first, second = (line.split() for line in done.stdout.splitlines())
    assert header == ["URL", "STATE", "VERSION", "AGE", "BACKEND", "WORKERS"]
    assert first[:3] + first[-2:] == [one.url, "ready", "7", "loopback", "1"]
    assert second == [two.url, "created", "-", "loopback", "1"]
    assert (ready["url"], ready["version"]) == (one.url, 7) and abs(ready["published"] - time.time()) < 60
    assert (created["version"], created["published"], created["error"]) == (None, None, None)


def test_a_worker_that_has_failed_is_named_with_its_error() -> None:
    def load(_weights: object) -> None:
        raise RuntimeError("the kernel does not take them")

    with (
        wt.WeightReceiver(CONFIG, nn.Linear(4, 2), load_weights=load) as receiver,
        wt.serve(receiver) as server,
        wt.WeightSender(CONFIG, [server.url]) as sender,
    ):
        with pytest.raises(wt.TransferError):
            sender.send(nn.Linear(4, 2), version=1)
        done, [worker] = status(server.url), told(server.url)
    assert (done.exit_code, worker["state"]) == (1, "failed")
    assert "the kernel does not take them" in worker["error"]
    assert f"{server.url}: {worker['error']}" in done.stdout


def test_a_token_is_asked_for_and_taken_from_the_environment(
    receiver: wt.WeightReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wt.serve(receiver, token="secret") as server:
        refused = status(server.url)
        assert (refused.exit_code, told(server.url)[0]["state"]) == (1, "refused")
        assert "token" in refused.stdout
        assert status(server.url, "--token", "secret").exit_code == 0
        monkeypatch.setenv("WEIGHT_TRANSFER_TOKEN", "secret")
        assert status(server.url).exit_code == 0


def test_a_worker_that_is_not_there_or_silent_is_unreachable_within_the_timeout(receiver: wt.WeightReceiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (silent, gone)]
        gone.close()
        since = time.monotonic()
        done = status(*urls, "--timeout", "0.2")
    assert time.monotonic() - since < 10
    assert done.exit_code == 1
    assert done.stdout.count("unreachable") == 2


def test_an_address_that_is_none_is_one_sentence() -> None:
    done = status("127.0.0.1:8001")
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
