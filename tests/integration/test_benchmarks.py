"""What is measured on a host with several GPUs runs on CPUs, too, on small weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
