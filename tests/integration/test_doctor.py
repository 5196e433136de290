"""``weight-transfer doctor`` says what is missing and what mends it, and measures links with real updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import weight_transfer as wt
from weight_transfer import load_backend
from weight_transfer.bench.pairs import links, measure
from weight_transfer.cli import main

PLUGIN = """
from weight_transfer.authoring import API_VERSION, Backend, Check, Probe, Verdict, hookimpl

@hookimpl
def weight_transfer_backend():
    return Backend(
        name="acme", api_version=API_VERSION, summary="for a test", worker_engine="nowhere:Engine",
        trainer_engine="nowhere:Engine", capabilities={{"cpu", "cross-process"}},
    )

@hookimpl
def weight_transfer_checks():
    return [
        Check(title="cable", verdict=Verdict.{verdict}, found="not plugged in", fix="Plug it in."),
        Check(title="card", found="there"),
    ]
"""


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture
def acme(install: Callable[..., Path]) -> Callable[[str], Path]:
    """Install a backend whose check comes to the verdict."""

    def installed(verdict: str) -> Path:
        entry_points = {"weight_transfer.backends": {"acme": "acme_plugin"}}
        return install("acme", entry_points, {"acme_plugin": PLUGIN.format(verdict=verdict)})

    return installed


def test_it_shows_each_check_with_what_mends_it(acme: Callable[[str], Path]) -> None:
    acme("LIMITED")
    done = doctor()
    assert done.exit_code == 0, "what is slow is no failure"
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["acme", "available"] in lines and ["ipc", "available"] in lines
    marked = {mark: text.split("  ")[0] for mark, text in (line for line in lines if len(line) > 1) if mark in "!x"}
    assert "!" in marked
    assert "not plugged in" in done.stdout and "fix: Plug it in." in done.stdout


@pytest.mark.parametrize(("verdict", "code"), [("LIMITED", 0), ("BROKEN", 1)])
def test_the_exit_status_is_that_of_the_chosen_backend(
    acme: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdict: str, code: int
) -> None:
    acme(verdict)
    assert doctor("--backend", "acme").exit_code == code
    monkeypatch.setenv("WEIGHT_TRANSFER_BACKEND", "acme")
    done = doctor("--json")
    [row] = json.loads(done.stdout)
    assert (done.exit_code, row["name"]) == (code, "acme")
    assert row["checks"][0] == {
        "title": "cable",
        "verdict": verdict.lower(),
        "found": "not plugged in",
        "fix": "Plug it in.",
    }
    monkeypatch.delenv("WEIGHT_TRANSFER_BACKEND")
    file = tmp_path / "sync.toml"
    file.write_text('[weight_transfer]\nbackend = "acme"\n')
    assert doctor("--config", str(file)).exit_code == code


def test_a_backend_that_cannot_be_loaded_is_a_failure(install: Callable[..., Path]) -> None:
    install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": "raise RuntimeError('no')"})
    done = doctor()
    assert done.exit_code == 1
    assert "its module fails to import" in done.stdout
    assert doctor("--backend", "nothing").exit_code == 1


def pair(backend: str) -> tuple[int, dict[str, Any]]:
    done = doctor("--backend", backend, "--pair", "--mib", "1", "--json")
    [row] = json.loads(done.stdout)
    link: dict[str, Any] = row["links"][0]
    return done.exit_code, link


def test_what_a_locale_cannot_say_is_told_in_another_way() -> None:
    done = CliRunner(charset="ascii").invoke(main, ["doctor", "--backend", "caf\xe9"])
    assert (done.exit_code, "caf\\xe9" in done.output, done.exception.__class__) == (1, True, SystemExit)


def test_a_link_is_measured_by_updates_between_two_processes() -> None:
    code, link = pair("ipc")
    assert (code, link["error"], link["transport"]) == (0, None, "shared memory")
    assert (link["trainer"], link["worker"]) == ("cpu", "cpu")
    assert link["gbps"] > 0


def test_a_link_that_fails_is_named_with_its_error(acme: Callable[[str], Path]) -> None:
    acme("OK")
    code, link = pair("acme")
    assert code == 1
    assert link["gbps"] == 0 and "nowhere:Engine" in link["error"]


def test_a_link_that_the_backend_does_not_offer_is_none_that_fails() -> None:
    options = wt.WeightTransferConfig(backend="rdma", options={"transport": "nvlink"})
    link = measure(options, "cpu", "cpu", 2**20)
    assert (link.error, link.gbps) == (None, 0)
    assert link.refused is not None and "not over nvlink as this worker's options demand" in link.refused


def test_links_are_those_that_a_backend_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.bench.pairs.find_gpus", lambda: type("", (), {"indices": [0, 1, 2]}))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    between = [("cuda:0", "cuda:1"), ("cuda:0", "cuda:2"), ("cuda:1", "cuda:2")]
    assert [*links("loopback")] == []
    assert [*links("ipc")] == [("cpu", "cpu"), ("cuda:0", "cuda:0"), *between]
    assert [*links("nccl")] == [("cpu", "cpu"), *between]


@pytest.mark.parametrize("backend", ["ipc", "nccl", "rdma"])
def test_our_backends_check_this_machine(backend: str) -> None:
    found = load_backend(backend).checks()
    assert {"torch", "GPUs"} <= {check.title for check in found}
    assert all(check.found for check in found)
