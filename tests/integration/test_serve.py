"""``weight-transfer serve``: OpenAI's API over a model that takes updates; each answer is of one version."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import weight_transfer as wt
from support.tiny_llama import expected, model, save, tokenizer
from weight_transfer.cli import main

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from support.served import CONFIG, COUNT, ask, events, worker
from weight_transfer.reference_server.worker import open_worker

PROMPTS = ["The capital of France is", "def f(n):", "Once upon a time", "é"]


@contextmanager
def process(path: Path) -> Iterator[str]:
    """Run the command, yield its URL, and end it as a container is ended."""
    command = [sys.executable, "-m", "weight_transfer", "serve", str(path), "--port", "0", "--name", "tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as served:
        assert served.stdout is not None and served.stderr is not None
        try:
            assert served.stdout.readline() == f"Loading {path}\n"
            assert select.select([served.stdout], [], [], 100)[0]
            yield served.stdout.readline().split()[1]
            served.send_signal(signal.SIGTERM)
            told = served.communicate(timeout=30)[1]
            assert served.returncode == 0 and "Traceback" not in told, told
        finally:
            served.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", 1)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    """Of a worker of this process, which serves the model of seed 1 as version 0."""
    with worker(folder) as client:
        yield client


def push(folder: Path, *urls: str, version: int) -> None:
    to = [text for url in urls for text in ("--to", url)]
    done = CliRunner().invoke(main, ["push", str(folder), *to, "--version", str(version)])
    assert done.exit_code == 0, done.output


def test_a_pushed_checkpoint_continues_as_in_transformers_on_every_worker(folder: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 2)
    with ExitStack() as stack:
        url = stack.enter_context(process(folder / "config.json"))
        clients = [stack.enter_context(each) for each in (httpx.Client(base_url=url, timeout=60), worker(folder))]
        urls = [str(client.base_url) for client in clients]
        for version, (path, seed) in enumerate([(folder, 1), (other, 2), (folder, 1)], 5):
            push(path, *urls, version=version)
            for client in clients:
                answer = ask(client, prompt=PROMPTS, return_token_ids=True)
                assert answer["weight_version"] == version
                wanted = [expected(seed, prompt, COUNT) for prompt in PROMPTS]
                assert [choice["token_ids"] for choice in answer["choices"]] == wanted
                texts = [choice["text"] for choice in answer["choices"]]
                assert texts == [tokenizer().decode(tokens, skip_special_tokens=True) for tokens in wanted]


def test_requests_in_flight_are_answered_by_one_version_each(folder: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 2)
    tokens = {0: expected(1, "x", 200), 1: expected(2, "x", 200)}
    assert tokens[0] != tokens[1]
    with worker(folder) as client:
        answers = asyncio.run(load(str(client.base_url), other))
    versions = [answer["weight_version"] for answer in answers]
    assert len(answers) == 30, "none is lost"
    assert versions[:20] == [0] * 20, "those under way end on the old version"
    assert versions[-5:] == [1] * 5
    for answer in answers:
        assert answer["choices"][0]["token_ids"] == tokens[answer["weight_version"]]


async def load(url: str, checkpoint: Path) -> list[dict[str, Any]]:
    """Have 20 requests under way when a push begins, 5 more while it waits for them, and 5 after it."""
    body = {"prompt": "x", "max_tokens": 200, "temperature": 0, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:

        def begin(count: int) -> list[asyncio.Task[httpx.Response]]:
            return [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(count)]

        first = begin(20)
        while "weight_transfer_requests_running 20.0" not in (await client.get("/metrics")).text:
            if any(task.done() for task in first):
                break
        pushing = asyncio.create_task(asyncio.to_thread(push, checkpoint, url, version=1))
        while not pushing.done() and (await client.get("/status")).json()["state"] == "created":
            await asyncio.sleep(0)
        second = begin(5)
        await pushing
        answers = [(await task).json() for task in (*first, *second)]
        return answers + [(await task).json() for task in begin(5)]


def test_a_streamed_answer_is_the_whole_one_in_parts(client: httpx.Client) -> None:
    body = {"prompt": [PROMPTS[0], PROMPTS[3]], "max_tokens": COUNT, "temperature": 0}
    whole = ask(client, **body)
    chunks, version = events(client, "/v1/completions", body)
    assert version == "0" and {chunk["weight_version"] for chunk in chunks} == {0}
    assert chunks.pop()["usage"] == whole["usage"]
    assert all(chunk["choices"] for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert len(parts) > 1
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_a_chat_is_continued_after_its_template(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": COUNT, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    said = answer["choices"][0]["message"]
    wanted = tokenizer().decode(expected(1, "user: Hello\nassistant:", COUNT), skip_special_tokens=True)
    assert (said["role"], said["content"], answer["weight_version"]) == ("assistant", wanted, 0)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = client.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": parts}]})
    assert in_parts.json()["choices"] == answer["choices"]
    chunks, _ = events(client, "/v1/chat/completions", body)
    assert "".join(part["delta"]["content"] for chunk in chunks for part in chunk["choices"]) == wanted


def test_an_answer_ends_before_a_text_that_stops_it(client: httpx.Client) -> None:
    whole = ask(client, prompt="x", max_tokens=40)["choices"][0]["text"]
    stop = whole[10:13]
    wanted = whole[: whole.index(stop)]
    assert ask(client, prompt="x", max_tokens=40, stop=[stop])["choices"][0] == {
        "index": 0,
        "text": wanted,
        "logprobs": None,
        "finish_reason": "stop",
    }
    chunks, _ = events(client, "/v1/completions", {"prompt": "x", "max_tokens": 40, "temperature": 0, "stop": stop})
    assert "".join(part["text"] for chunk in chunks for part in chunk["choices"]) == wanted


def test_sampling_takes_chances_as_far_as_it_is_told(client: httpx.Client) -> None:
    wanted = expected(1, "x", 20)
    body = {"prompt": ["x"] * 4, "max_tokens": 20, "return_token_ids": True}
    greedy = ask(client, **body, temperature=1, top_k=1)
    assert [choice["token_ids"] for choice in greedy["choices"]] == [wanted] * 4
    hot = ask(client, **body, temperature=50, top_k=100_000)
    assert len({tuple(choice["token_ids"]) for choice in hot["choices"]}) == 4
    cold = ask(client, **body, temperature=1e-300)
    assert [choice["token_ids"] for choice in cold["choices"]] == [wanted] * 4


def test_a_prompt_is_continued_as_often_as_is_wished(client: httpx.Client) -> None:
    answer = ask(client, prompt=["x", "y"], n=2, return_token_ids=True)
    wanted = [expected(1, prompt, COUNT) for prompt in ("x", "x", "y", "y")]
    assert [choice["token_ids"] for choice in answer["choices"]] == wanted
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2


def test_weights_that_are_not_finite_cost_the_requests_that_met_them_and_no_others(folder: Path) -> None:
    broken = model(1)
    for weight in broken.parameters():
        torch.nn.init.constant_(weight, float("nan"))
    body = {"prompt": "x", "max_tokens": COUNT, "temperature": 1}
    with worker(folder) as client, wt.WeightSender(CONFIG, [str(client.base_url)]) as sender:
        assert client.post("/v1/completions", json=body).status_code == 200
        sender.send(broken, version=1)
        failed = client.post("/v1/completions", json=body)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        sender.send(model(1), version=2)
        assert ask(client, prompt="x", temperature=1)["weight_version"] == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt": "x", "n": 129}, "n must be 1 to 128"),
        ({"prompt": ["x"] * 200, "n": 20}, "200 prompts, each 20 times"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "stream_options": 5}, "stream_options"),
        ({"prompt": "\ud800"}, "half of a character"),
        ({"prompt": "x" * 300}, "has 300 tokens, and the context 256"),
        ({"prompt": "x", "temprature": 1}, "temperature"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x" * 250}, "max_tokens"),
        ({"prompt": [1, 100_000]}, "token ids from 0"),
        ({"prompt": ""}, "at least one"),
        ({}, "prompt"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client: httpx.Client, fields: dict[str, Any], word: str) -> None:
    body = json.dumps({"max_tokens": COUNT, **fields})
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_bodies_and_messages_that_are_none_are_refused(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for route, content in (("completions", "["), ("completions", "[]"), ("chat/completions", '{"messages": [1]}')):
        assert client.post(f"/v1/{route}", content=content, headers=headers).status_code == 400
    assert client.post("/v1/completions", content="{}").status_code == 415, "what a web page could send"
    large = client.post("/v1/completions", json={"prompt": "x" * (17 << 20)})
    assert (large.status_code, "16777216 bytes" in large.json()["error"]["message"]) == (413, True)


def test_what_is_not_served_is_not_found(client: httpx.Client) -> None:
    other = client.post("/v1/completions", json={"prompt": "x", "model": "gpt-4"})
    for answer in (other, client.get("/v1/models/gpt-4")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_found")
        assert "no model 'gpt-4'; it has 'tiny'" in error["message"]
    for method, route in (("POST", "embeddings"), ("GET", "completions")):
        answer = client.request(method, f"/v1/{route}")
        assert (answer.status_code, route in answer.json()["error"]["message"]) == (404, True)


def test_the_model_and_the_metrics_tell_the_version(client: httpx.Client) -> None:
    [told] = client.get("/v1/models").json()["data"]
    assert (told["id"], told["weight_version"], told["max_model_len"]) == ("tiny", 0, 256)
    assert client.get("/v1/models/tiny").json() == told
    ask(client, prompt="x")
    metrics = client.get("/metrics").text
    assert 'weight_transfer_served{state="created"} 1.0' in metrics
    assert "weight_transfer_served_version 0.0" in metrics
    assert 'weight_transfer_requests_total{route="/v1/completions",status="200"}' in metrics
    assert client.get("/healthz").json() == {"ok": True}


def test_with_a_token_only_those_who_have_it_are_answered(folder: Path) -> None:
    config = wt.load_config(CONFIG, token="secret")
    with worker(folder, config=config, cache_tokens=64) as client:
        assert ask(client, prompt="x")["weight_version"] == 0
        too_long = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 64})
        assert (too_long.status_code, "1 to 63" in too_long.text) == (400, True), "what the cache has no room for"
        for method, route in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
            answer = client.request(method, route, headers={"Authorization": "Bearer wrong"}, json={})
            assert answer.status_code == 401
            assert "token" in answer.json()["error"]["message"]
    with pytest.raises(wt.ConfigError, match="needs a token"), open_worker(CONFIG, folder, "0.0.0.0", 0):
        pass


def test_random_weights_are_not_served_and_whoever_waits_too_long_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = wt.load_config(CONFIG, timeout=0.2)
    with worker(tmp_path / "config.json", config=config, name="tiny") as client:
        answer = client.post("/v1/completions", json={"prompt": [1, 2]})
        assert answer.status_code == 503
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert "has no tokenizer" in answer.json()["error"]["message"]
        streamed = client.post("/v1/completions", json={"prompt": [1, 2], "stream": True})
        assert streamed.status_code == 503


def test_an_update_does_not_wait_for_a_reader_that_is_gone_or_slow(folder: Path) -> None:
    body = {"prompt": "x", "max_tokens": 200, "temperature": 0}
    with worker(folder) as client, wt.WeightSender(CONFIG, [str(client.base_url)]) as sender:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as slow:
            sender.send(model(2), version=1)
            assert ask(client, prompt="x", max_tokens=1)["weight_version"] == 1
            assert '"weight_version": 0' in next(slow.iter_lines())


def test_an_address_that_is_taken_is_an_error_before_the_model_is_loaded(client: httpx.Client, tmp_path: Path) -> None:
    port = client.base_url.port or 0
    with pytest.raises(wt.ConfigError, match="choose another"), open_worker(CONFIG, tmp_path, "127.0.0.1", port):
        pass


def test_a_checkpoint_that_is_not_whole_is_not_served(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(wt.ConfigError, match=r"lacks 'lm_head\.weight'; complete the checkpoint"), worker(copy):
        pass
    os.truncate(file, 1000)
    with pytest.raises(wt.ConfigError, match="cannot load a causal language model"), worker(copy):
        pass


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(wt.ConfigError, match="cannot load a causal language model"), worker(tmp_path / "config.json"):
        pass
    with pytest.raises(wt.ConfigError, match=r"no safetensors file; name its config\.json"), worker(tmp_path):
        pass
