"""The plugin manager works with every release of pluggy that the core admits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["1.6.0", "1.7.0"])
def test_the_manager_keeps_its_promises_with_pluggy(version: str, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    fetched = subprocess.run([*install, f"pluggy=={version}"], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"pluggy {version} cannot be had from the package index: {fetched.stderr.strip()[-200:]}")

    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    which = [sys.executable, "-c", "import pluggy; print(pluggy.__file__, pluggy.__version__)"]
    found = subprocess.run(which, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(tmp_path / "pluggy/__init__.py"), version]

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_manager.py"]
    tests = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout + tests.stderr
