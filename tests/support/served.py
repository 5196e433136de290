"""``weight-transfer serve`` in the process of a test, and requests to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

import weight_transfer as wt
from weight_transfer.reference_server.worker import open_worker

CONFIG = wt.WeightTransferConfig(backend="ipc", timeout=30)
COUNT = 12
"""Tokens that are generated, unless a request says otherwise."""


@contextmanager
def worker(path: Path, **options: Any) -> Iterator[httpx.Client]:
    """Serve in this process, on one thread: several that compute so little would wait for each other, spinning."""
    config = options.pop("config", CONFIG)
    headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            open_worker(config, path, "127.0.0.1", 0, device="cpu", **options) as server,
            httpx.Client(base_url=server.url, timeout=60, headers=headers) as client,
        ):
            yield client
    finally:
        torch.set_num_threads(threads)


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"max_tokens": COUNT, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def events(client: httpx.Client, route: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the chunks of a streamed answer, and the version in its header."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", route, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines], answer.headers["x-weight-version"]
