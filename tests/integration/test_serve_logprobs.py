"""``weight-transfer serve`` says how likely its tokens were, and draws the same ones again from the same seed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import weight_transfer as wt
from support.tiny_llama import model, save, tokenizer

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from support.served import CONFIG, COUNT, ask, events, worker
from weight_transfer.reference_server.drawing import Drawing

SAMPLED = {"temperature": 1.7, "top_p": 0.9, "return_token_ids": True}
NEAR = {"abs": 2e-4, "rel": 0}  # of log-probabilities: sums of a batch are rounded otherwise than those of one prompt
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": COUNT}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a worker of this process, which serves the model of seed 1 as version 0."""
    with worker(save(tmp_path_factory.mktemp("models") / "tiny", 1)) as client:
        yield client


@cache
def reference(seed: int) -> Any:
    return model(seed)


@torch.inference_mode()
def plain(seed: int, prompt: str, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each place of an answer, from one plain forward pass."""
    before = tokenizer()(prompt)["input_ids"]
    logits: torch.Tensor = reference(seed)(torch.tensor([before + tokens])).logits
    return logits[0, len(before) - 1 : -1].log_softmax(-1)


def likely(token: int) -> str:
    """Return what a token is called."""
    text = str(tokenizer().decode([token]))
    return f"token_id:{token}" if "\ufffd" in text else text


def check(seed: int, prompt: str, choice: dict[str, Any], most: int) -> None:
    """Compare what a completion tells of its tokens with a plain forward pass."""
    tokens, told = choice["token_ids"], choice["logprobs"]
    wanted = plain(seed, prompt, tokens)
    assert told["tokens"] == [likely(token) for token in tokens]
    assert told["token_logprobs"] == pytest.approx(wanted[range(len(tokens)), tokens].tolist(), **NEAR)
    for token, logprob, top, row in zip(tokens, told["token_logprobs"], told["top_logprobs"], wanted, strict=True):
        values, ids = row.topk(most)
        best = {likely(one): value for one, value in zip(ids.tolist(), values.tolist(), strict=True)}
        assert top == pytest.approx({likely(token): logprob} | best, **NEAR)


def test_logprobs_are_those_of_a_plain_forward_pass_for_each_version(client: httpx.Client) -> None:
    with wt.WeightSender(CONFIG, [str(client.base_url)]) as sender:
        for version, seed in enumerate((1, 2, 1), 1):
            sender.send(model(seed), version=version)
            for how in (SAMPLED, {"temperature": 0, "return_token_ids": True}):
                answer = ask(client, prompt=["The capital", "é"], logprobs=3, **how)
                assert answer["weight_version"] == version
                for prompt, choice in zip(["The capital", "é"], answer["choices"], strict=True):
                    check(seed, prompt, choice, 3)


def test_wishes_that_meet_in_a_batch_are_each_granted(client: httpx.Client) -> None:
    wishes: list[dict[str, Any]] = [
        {"logprobs": 0, **SAMPLED},
        {"logprobs": 20, **SAMPLED, "top_k": 5},
        {"logprobs": 2, "temperature": 0},
        {"temperature": 0},
        {"logprobs": 1, "seed": 3, **SAMPLED},
        {"seed": 3, **SAMPLED},
        SAMPLED,
    ]
    prompts = [f"prompt {index}" for index in range(len(wishes))]

    def one(wish: dict[str, Any], prompt: str) -> dict[str, Any]:
        answer = ask(client, prompt=prompt, **{"return_token_ids": True} | wish)
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    with ThreadPoolExecutor(len(wishes)) as pool:
        choices = list(pool.map(one, wishes, prompts))
    for wish, prompt, choice in zip(wishes, prompts, choices, strict=True):
        if "logprobs" in wish:
            check(1, prompt, choice, wish["logprobs"])
        else:
            assert choice["logprobs"] is None


def test_a_cache_that_is_too_small_for_all_requests_costs_time_alone(tmp_path: Path) -> None:
    prompts = ["x" * 20, "y" * 25, "z" * 30]
    body = {"prompt": prompts, "max_tokens": 20, "logprobs": 1, "temperature": 1, "return_token_ids": True}
    with worker(save(tmp_path / "tiny", 1), cache_tokens=64) as client:
        for prompt, choice in zip(prompts, ask(client, **body)["choices"], strict=True):
            check(1, prompt, choice, 1)


def test_a_seed_gives_the_same_tokens_whatever_else_is_under_way(client: httpx.Client) -> None:
    body = {"prompt": "Once", "logprobs": 0, **SAMPLED}

    def drawn(seed: int) -> tuple[list[int], list[float]]:
        choice = ask(client, **body, seed=seed)["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    wanted = {seed: drawn(seed) for seed in (0, 1, -1)}
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) == 3, "other seeds give others"
    with ThreadPoolExecutor(20) as pool:
        others = [pool.submit(ask, client, prompt="x" * 9, max_tokens=40, **SAMPLED) for _ in range(8)]
        again = {seed: pool.submit(drawn, seed) for seed in wanted}
        assert {seed: future.result() for seed, future in again.items()} == wanted, "to the last bit"
        for other in others:
            other.result()


def test_each_copy_of_a_prompt_has_the_next_seed(client: httpx.Client) -> None:
    copies = ask(client, prompt=["x", "x"], n=2, seed=7, **SAMPLED)["choices"]
    first, second = (ask(client, prompt="x", seed=seed, **SAMPLED)["choices"][0]["token_ids"] for seed in (7, 8))
    assert [copy["token_ids"] for copy in copies] == [first, second, first, second]


def test_a_seed_whose_client_has_left_keeps_nobody_waiting(client: httpx.Client) -> None:
    async def leave_and_come() -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as other:
            body = {"prompt": "x", "max_tokens": 250, "seed": 1}
            gone = [asyncio.create_task(other.post("/v1/completions", json=body)) for _ in range(3)]
            while "weight_transfer_requests_running 3.0" not in (await other.get("/metrics")).text:
                assert not any(task.done() for task in gone)
            for task in gone:
                task.cancel()
            await asyncio.wait(gone)
            answer: dict[str, Any] = (await other.post("/v1/completions", json=body | {"max_tokens": 2})).json()
            return answer

    assert asyncio.run(leave_and_come())["usage"]["completion_tokens"] == 2


def test_tokens_that_are_not_the_drawn_ones_are_no_answer(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Drawing.__call__

    def left_to_others(drawing: Drawing, scores: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
        draw(drawing, scores, argument)
        return scores

    monkeypatch.setattr(Drawing, "__call__", left_to_others)
    answer = client.post("/v1/completions", json={"prompt": "x", "temperature": 50, "logprobs": 0})
    assert (answer.status_code, "tokens that were drawn" in answer.text) == (500, True)


def test_a_chat_tells_of_its_tokens_in_its_own_form(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | SAMPLED | {"logprobs": True, "top_logprobs": 2}).json()
    [choice] = answer["choices"]
    wanted = plain(1, "user: Hello\nassistant:", choice["token_ids"])
    for token, told, row in zip(choice["token_ids"], choice["logprobs"]["content"], wanted, strict=True):
        name = likely(token)
        assert told["token"] == name
        assert told["bytes"] == (None if name.startswith("token_id:") else list(name.encode()))
        assert told["logprob"] == pytest.approx(row[token].item(), **NEAR)
        values, ids = row.topk(2)
        assert [one["token"] for one in told["top_logprobs"]] == [likely(one) for one in ids.tolist()]
        assert [one["logprob"] for one in told["top_logprobs"]] == pytest.approx(values.tolist(), **NEAR)
    alone = client.post("/v1/chat/completions", json=CHAT | {"logprobs": True}).json()
    assert [one["top_logprobs"] for one in alone["choices"][0]["logprobs"]["content"]] == [[]] * COUNT


def test_a_streamed_answer_tells_the_same_in_parts(client: httpx.Client) -> None:
    body = {"prompt": "é", "max_tokens": 40, "logprobs": 2, "seed": 5, **SAMPLED}
    told = ask(client, **body)["choices"][0]["logprobs"]
    chunks, _ = events(client, "/v1/completions", body)
    parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"]]
    assert len(parts) == 40
    assert {name: [one for part in parts for one in part[name]] for name in told} == told
    chat = CHAT | {"logprobs": True, "seed": 5}
    content = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
    chunks, _ = events(client, "/v1/chat/completions", chat)
    assert [one for chunk in chunks for part in chunk["choices"] for one in part["logprobs"]["content"]] == content


def test_an_answer_that_a_text_has_ended_tells_of_all_its_tokens(client: httpx.Client) -> None:
    whole = ask(client, prompt="x", max_tokens=40)["choices"][0]["text"]
    choice = ask(client, prompt="x", max_tokens=40, stop=whole[10:13], logprobs=1, return_token_ids=True)["choices"][0]
    assert choice["text"] == whole[: whole.index(whole[10:13])]
    check(1, "x", choice, 1)


@pytest.mark.parametrize(
    ("route", "fields", "word"),
    [
        ("completions", {"logprobs": 21}, "logprobs must be 0 to 20, got 21"),
        ("completions", {"logprobs": True}, "logprobs must be 0 to 20, got True"),
        ("completions", {"top_logprobs": 1}, "top_logprobs is not supported"),
        ("completions", {"seed": 1 << 63}, r"from -2**63 to 2**63 - 1"),
        ("completions", {"seed": 1.5}, "got 1.5"),
        ("completions", {"logprobs": 20, "n": 128, "prompt": ["x"] * 4, "max_tokens": 200}, "2150400 log-prob"),
        ("chat/completions", {"logprobs": 1}, "must be true or false, got 1"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs must be 0 to 20"),
        ("chat/completions", {"top_logprobs": 1}, "needs logprobs to be true"),
    ],
)
def test_a_wrong_wish_is_told_what_is_wrong(
    client: httpx.Client, route: str, fields: dict[str, Any], word: str
) -> None:
    asked = CHAT if route.startswith("chat") else {"prompt": "x"}
    answer = client.post(f"/v1/{route}", json=asked | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert word in error["message"]
