"""The example runs: each sample says of which version it is, and a node that is killed costs a few samples."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

RUN = Path(__file__).parents[1] / "run.py"


def rows_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(RUN), "--target", "2", "--out", str(folder / "run"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ElementTree.parse(folder / "run.svg").getroot().tag.endswith("svg")
    assert '"role":"trainer"' in (folder / "run.html").read_text().replace(" ", "")
    return json.loads((folder / "run.json").read_text())["steps"]


def test_two_processes_sample_a_version_behind(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--steps", "3")
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert [row["samples"] for row in rows] == [256] * 3
    assert [row["lag"] for row in rows] == [0, 1, 1]
    assert all(0.9 < row["importance"] < 1.1 for row in rows)


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_a_run_on_three_nodes_outlives_one(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--ray", "--nodes", "3", "--steps", "10")
    assert [row["version"] for row in rows] == [*range(1, 11)]
    assert any(row["lost"] for row in rows)
    assert all(row["samples"] >= 128 for row in rows)
