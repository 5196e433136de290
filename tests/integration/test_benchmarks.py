"""The scripts of ``benchmarks`` set more beside updates, and run on CPUs, too, on small weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ipc_schemes
import nccl
import pytest
import rdma
import torch

from weight_transfer.bench.measuring import Case, Figures, measure
from weight_transfer.bench.sweeping import alike
from weight_transfer.limit import LimitSide

ROOT = Path(__file__).parents[2]
MODEL = alike(3, 4096)


def compared(backend: str, **more: Any) -> Figures:
    case = Case(model=MODEL, config={"backend": backend}, trainers=["cpu"], workers=["cpu"], rounds=1, **more)
    return measure(case)


@pytest.mark.parametrize(("backend", "schemes"), [("nccl", nccl.SCHEMES), ("rdma", rdma.SCHEMES)])
def test_schemes_stand_beside_updates(backend: str, schemes: dict[str, str]) -> None:
    found = compared(backend, schemes=schemes)
    assert found["schemes"].keys() == schemes.keys()
    assert all(figures["median"] > 0 for figures in found["schemes"].values())


def test_sides_of_an_ipc_scheme_hear_each_other_and_wait_for_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    trainer, worker = (
        ipc_schemes.Shared(LimitSide(config=None, member=member, trainers=[cpu], device=cpu, sizes=[], alike=True))
        for member in range(2)
    )
    address = trainer.offer()
    worker.join([address])
    trainer.join([address])
    worker._line.say(["copied", 1])
    assert trainer._line.hear() == ["copied", 1]
    worker.close()
    trainer.close()
    monkeypatch.setattr(ipc_schemes, "LONG", 0.1)
    trainer.offer()
    with pytest.raises(TimeoutError):
        trainer.join([])


def test_a_cast_stands_beside_an_exact_send() -> None:
    ways: dict[str, dict[str, Any]] = {"cast": {"cast": {"*": "bfloat16"}}, "exact": {"verify": "wire"}}
    alone, roles = {"to()": "cast_trainer:CastAlone"}, ("cast_trainer", "cast_worker")
    found = compared("ipc", ways=ways, schemes=alone, roles=roles)
    assert found["ways"].keys() == {"exact"} and found["schemes"].keys() == alone.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_layouts_over_all_backends_bring_the_right_bits(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/host.py", "--device", "cpu", "--quick", "--seconds", "800"]
    command += ["--only", "dense", "--only", "moe", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {each["name"]: each["failed"] for each in json.loads(figures.read_text())}
    assert not any(found.values()), f"{found}\n{done.stdout}"
    assert {f"{backend} hsdp dense" for backend in ("ipc", "nccl", "rdma")} <= found.keys()
    assert done.returncode == 0, done.stderr
