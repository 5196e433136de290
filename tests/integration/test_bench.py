"""``weight-transfer bench`` sends real bytes between real processes, compares them, and says what they cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from support.bench_results import results as example
from weight_transfer import load_backend, load_config
from weight_transfer.bench import sweeping
from weight_transfer.bench.configurations import model_shape
from weight_transfer.bench.measuring import Case
from weight_transfer.bench.sweeping import alike, points_of
from weight_transfer.bench.troupe import Troupe
from weight_transfer.cli import main
from weight_transfer.errors import BackendContractError, TransferError
from weight_transfer.limit import CopyLimit, LimitSide

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 80, "num_hidden_layers": 2}
MIXTURE = SMALL | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48}

PLUGIN = """
from weight_transfer.authoring import API_VERSION, Backend, hookimpl

@hookimpl
def weight_transfer_backend():
    return Backend(
        name="acme", api_version=API_VERSION, summary="for a test", worker_engine="nowhere:Engine",
        trainer_engine="nowhere:Engine", limit="builtins:repr", capabilities={"cpu", "cross-process"},
    )
"""


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MIXTURE))
    return path


@pytest.fixture
def acme(install: Callable[..., Path]) -> None:
    """Install a backend whose engines cannot be imported, and whose limit is none."""
    install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": PLUGIN})


def test_cases_of_several_backends_are_a_table_a_file_and_a_page(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_TENSORS", (10,))
    monkeypatch.setattr(sweeping, "_ALL_BYTES", {"cpu": 10_000})
    files = tmp_path / "results.json", tmp_path / "page.html"
    given = ["--device", "cpu", "--rounds", 2, "--sweep", "tensors", "--json", files[0], "--html", files[1]]
    done = bench("--backend", "ipc", "--backend", "zeromq", "--shape", shape, "--workers", 2, *given)
    assert done.exit_code == 0, done.output
    results = json.loads(files[0].read_text())
    model = model_shape(str(shape))
    for case in results["cases"]:
        assert case["error"] is None and case["bits_equal"]
        assert (case["tensors"], case["bytes"], case["kept"]) == (len(model.shapes), model.nbytes, [model.nbytes] * 2)
        for name in ("limit", "engine", "update", "send"):
            figures = case[name]
            assert 0 < figures["min"] <= figures["median"] <= figures["max"] and len(figures["seconds"]) == 2
        rows = {row["who"]: row["spans"] for row in case["timeline"]["rows"]}
        assert list(rows) == list(case["phases"]) == ["trainer 0", "worker 0", "worker 1"]
        assert [span["phase"] for span in rows["worker 1"]] == ["check", "receive", "commit"]
        for spans in rows.values():
            ends = [span["begin"] + span["seconds"] for span in spans]
            assert all(end <= span["begin"] + 1e-6 for end, span in zip(ends, spans[1:], strict=False))
    assert [case["backend"] for case in results["cases"]] == ["ipc", "zeromq"]
    assert [point["tensors"] for point in results["sweeps"][0]["points"]] == [10]
    assert keys(results) >= keys(example()), "what the page is tested with"
    assert "small, 2 of 2 layers" in done.stdout and "zeromq" in done.stdout
    assert all(name in files[1].read_text() for name in ("small", "ipc", "zeromq"))


def keys(results: dict[str, Any]) -> set[tuple[str, str]]:
    """Return the names of all fields of results, with the name of what they are fields of."""
    parts = {"results": results, "case": results["cases"][0], "sweep": results["sweeps"][0]}
    parts |= {"point": parts["sweep"]["points"][0], "limit": parts["case"]["limit"], "send": parts["case"]["send"]}
    parts |= {"machine": results["machine"], "options": results["options"]}
    return {(part, name) for part, fields in parts.items() for name in fields}


def test_ranks_send_to_workers_that_share_a_copy(shape: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    given = ["--trainers", 2, "--workers", 2, "--tensor-parallel", 2, "--device", "cpu", "--rounds", 1, "--json", file]
    done = bench("--backend", "nccl", "--shape", shape, *given)
    assert done.exit_code == 0, done.output
    (case,) = json.loads(file.read_text())["cases"]
    assert case["bits_equal"] and case["limit"]["what"].startswith("grouped sends and receives")
    assert case["bytes"] / 2 <= sum(case["kept"]) / 2 < case["bytes"] * 0.6
    assert [span["phase"] for span in case["timeline"]["rows"][1]["spans"]] == ["check", "receive regions", "commit"]


def test_other_bits_are_noticed() -> None:
    schemes = {"idle": "support.idle_scheme:Idle"}
    case = Case(model=alike(3, 64), config={"backend": "ipc"}, trainers=["cpu"], workers=["cpu"], schemes=schemes)
    with Troupe(case.scene, 60) as troupe:
        troupe.connect()
        for actor in troupe.everyone:
            os.kill(actor.pid, signal.SIGINT)  # a terminal tells all; only the command heeds it
        troupe.bring(1, lambda: troupe.send("send"))
        with pytest.raises(TransferError, match=r"\[9\d\] elements that are not those of version 2"):
            troupe.require_bits(2)
        assert troupe.open_limit("idle") == ("nothing", True)
        with pytest.raises(TransferError, match=r"elements that are not those of version 1"):
            troupe.bring(1, lambda: troupe.run_limit("idle"))


@pytest.mark.usefixtures("acme")
def test_a_case_that_fails_is_a_row_and_the_status(shape: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = bench("--backend", "acme", "--shape", shape, "--device", "cpu", "--html", "/dev/full", "--json", file)
    assert done.exit_code == 1
    assert "error: /dev/full cannot be written: No space left on device." in done.stderr
    (case,) = json.loads(file.read_text())["cases"]
    assert "nowhere" in case["error"] and case["send"] is None and case["kept"] == []
    assert f"acme: error: {case['error']}" in done.stdout


@pytest.mark.usefixtures("acme")
def test_a_backend_that_does_not_say_what_bounds_it_is_set_beside_a_copy() -> None:
    cpu = torch.device("cpu")
    config = load_config({"backend": "zeromq"})
    side = LimitSide(config=config, member=1, trainers=[cpu], device=cpu, sizes=[1024], alike=True)
    limit = load_backend("zeromq").create_limit(side)
    assert isinstance(limit, CopyLimit)
    limit.join([None])
    assert limit.run()[0] > 0
    with pytest.raises(BackendContractError, match="builtins:repr must return a Limit, got str"):
        load_backend("acme").create_limit(side)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "loopback"], "'loopback' cannot be measured: it moves bytes inside of one process only."),
        (["--backend", "ips"], "Did you mean 'ipc'?"),
        (["--backend", "zeromq", "--tensor-parallel", 2, "--workers", 2], "each of its workers keeps a whole copy"),
        (["--backend", "zeromq", "--device", "cuda"], "it does not move cuda tensors."),
        (["--workers", 3, "--tensor-parallel", 2], "3 workers do not make copies of 2 each."),
        (["--backend", "ipc", "--shape", "nope"], "There is no shape 'nope'"),
        (["--backend", "ipc", "--device", "cpu", "--shape", "deepseek-v3", "--width", 1], "this machine has room for"),
        (["--json", "nowhere/results.json"], "There is no folder nowhere for results.json."),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[object], sentence: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_file_that_could_not_be_written_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    done = bench("--html", tmp_path / "page.html")
    assert done.exit_code == 2
    assert f"The folder {tmp_path} for page.html cannot be written to." in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_it_and_its_processes_without_a_word_of_theirs(shape: Path) -> None:
    command = [sys.executable, "-c", "from weight_transfer.cli import main; main()", "bench", "--backend", "ipc"]
    command += ["--shape", str(shape), "--rounds", "10000"]  # more than there is time for, but not for ever
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            while "to 1 worker on" not in process.stderr.readline():
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)  # until its processes have closed what they inherited
        finally:
            process.kill()
    assert (process.returncode, said.split()) == (1, ["Aborted!"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_change_one_thing(device: str) -> None:
    by_tensors, by_bytes = list(points_of("tensors", device)), list(points_of("bytes", device))
    assert [len(model.shapes) for model in by_tensors] == [1, 10, 100, 1000, 10_000]
    assert len({model.nbytes for model in by_tensors}) == 1
    assert {len(model.shapes) for model in by_bytes} == {100}
    assert [model.nbytes for model in by_bytes] == sorted({model.nbytes for model in by_bytes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_are_measured_too(shape: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    backends = ["ipc", "nccl", "rdma"] if torch.cuda.device_count() > 1 else ["ipc"]  # UCX may have no link in one GPU
    wanted = [argument for name in backends for argument in ("--backend", name)]
    done = bench(*wanted, "--shape", shape, "--rounds", 2, "--json", file)
    assert done.exit_code == 0, done.output
    cases = json.loads(file.read_text())["cases"]
    assert [case["backend"] for case in cases] == backends
    for case in cases:
        assert case["bits_equal"] and case["device"] == "cuda" and case["trainer_devices"] == ["cuda:0"]
