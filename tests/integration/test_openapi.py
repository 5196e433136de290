"""The server's OpenAPI description says what the server does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

import weight_transfer as wt
from support.models import Odd
from weight_transfer.control.openapi import schema_of

ROOT = Path(__file__).parents[2]
CONFIG = wt.load_config(backend="loopback", timeout=20, init_timeout=10)


def test_every_route_but_that_of_lines_is_described() -> None:
    with wt.WeightReceiver(CONFIG, Odd(1)) as receiver:
        app = wt.create_app(receiver)
        with wt.Server(app, "127.0.0.1", 0) as server:
            description = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
        routes = {route.path: route.methods for route in app.routes if isinstance(route, Route)}
    assert description["openapi"] == "3.1.0"
    assert description["paths"].keys() == routes.keys() - {"/line", "/openapi.json"}
    for path, operations in description["paths"].items():
        assert {method.upper() for method in operations} == (routes[path] or set()) - {"HEAD"}
    assert description["paths"]["/healthz"]["get"]["security"] == []


def test_a_channel_without_a_call_has_no_description_of_it() -> None:
    class Bare:
        def __getattr__(self, name: str) -> Any:
            if name in ("status", "weight_needs", "abort_weight_update", "when_sampled", "config"):
                raise AttributeError(name)
            return lambda **_: None

    with wt.serve(Bare()) as server:
        description = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    assert not {"/status", "/weight_needs", "/abort_weight_update"} & description["paths"].keys()


def test_what_the_description_forbids_is_refused() -> None:
    with wt.WeightReceiver(CONFIG, Odd(1)) as receiver, wt.serve(receiver) as server:
        description = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
        for path, operations in description["paths"].items():
            if "post" not in operations:
                continue
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            for wrong in ({"none of these": 1}, *({name: 0.5} for name in schema["properties"])):
                answer = httpx.post(f"{server.url}{path}", json=wrong, trust_env=False)
                assert (answer.status_code, answer.json()["error"]["type"]) == (400, "ConfigError"), (path, wrong)


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (bool, {"type": "boolean"}),
        (str | None, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (tuple[str, ...], {"type": "array", "items": {"type": "string"}}),
        (dict[str, Any], {"type": "object", "additionalProperties": {}}),
        (object, {}),
    ],
)
def test_types_as_json_schemas(kind: Any, schema: dict[str, Any]) -> None:
    assert schema_of(kind) == schema


def fuzz(figures: Path, requests: int, parts: int) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/http_fuzz.py", "--json", str(figures)]
    command += ["--requests", str(requests), "--parts", str(parts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(figures.read_text())
    assert (found["failures"], found["good updates"], done.returncode) == ([], parts, 0), done.stdout
    assert "Traceback" not in done.stderr
    assert found["requests"] == requests
    return found


def test_malformed_requests_get_no_500_and_the_next_update_is_good(tmp_path: Path) -> None:
    fuzz(tmp_path / "figures.json", 800, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_thousand_malformed_requests_cost_no_memory(tmp_path: Path) -> None:
    held = fuzz(tmp_path / "figures.json", 20_000, 10)["held"]
    assert held[-1]["MB"] < held[0]["MB"] + 20
    assert held[-1]["descriptors"] <= held[0]["descriptors"] + 2
