"""A stranger's distribution, installed from its wheel: listed, checked, used, and its observer heard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SEND = Path(__file__).with_name("sample_send.py")


@pytest.fixture
def clean(environment: Callable[..., Any]) -> Any:
    return environment("weight-transfer", "weight-transfer-sample")


def test_the_command_line_lists_it_and_shows_what_it_says_of_this_machine(clean: Any) -> None:
    rows = {row["name"]: row for row in json.loads(clean.run("weight-transfer", "backends", "--check", "--json"))}
    assert rows.keys() == {"files", "loopback"}
    row = rows["files"]
    assert (row["distribution"], row["version"]) == ("weight-transfer-sample", "1.0.0")
    assert row["available"] and row["error"] is None
    assert row["capabilities"] == ["cpu", "cross-process", "rejoin"]
    assert row["diagnostics"]["room for weights"].endswith(" GB")


def test_weights_go_to_another_process_and_the_observer_writes_a_line_on_each_side(clean: Any, tmp_path: Path) -> None:
    log, shared = tmp_path / "updates.jsonl", tmp_path / "shared"
    shared.mkdir()
    answer = json.loads(clean.run("python", "-I", str(SEND), str(shared), str(log)))
    assert answer["received"] == answer["sent"]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(event["role"] for event in events) == ["trainer", "worker"]
    for event in events:
        assert (event["backend"], event["version"], event["error"]) == ("files", 7, None)
        assert event["nbytes"] == 4 * (100 * 100 + 100)
    assert list(shared.iterdir()) == [], "files stayed behind"
