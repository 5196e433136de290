"""``weight-transfer new``: the package of a new backend. Its life after installation is in the packaging tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from weight_transfer.cli import main
from weight_transfer.errors import ConfigError
from weight_transfer.scaffold import write_backend

FILES = {
    "README.md",
    "pyproject.toml",
    "tests/test_conformance.py",
    *(
        f"weight_transfer_zeta_fabric/{name}"
        for name in ("__init__.py", "config.py", "engine.py", "plugin.py", "py.typed")
    ),
}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_writes_a_package_and_says_what_to_do_next(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["new", "zeta-fabric", "--directory", str(tmp_path / "src")])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "src" / "weight-transfer-zeta-fabric"
    assert _files(folder) == FILES
    for line in (
        f"pip install -e '{folder}[dev]'",
        f"pytest {folder}",
        "weight-transfer demo --backend zeta-fabric",
        "weight_transfer_zeta_fabric/engine.py",
    ):
        assert line in done.output


def test_the_name_stands_wherever_it_belongs(tmp_path: Path) -> None:
    folder = write_backend("zeta-fabric", tmp_path)
    everything = "\n".join((folder / file).read_text() for file in FILES)
    assert "acme" not in everything.lower()
    assert 'zeta-fabric = "weight_transfer_zeta_fabric.plugin"' in (folder / "pyproject.toml").read_text()
    assert "class ZetaFabricWorkerEngine(" in everything
    assert 'name="zeta-fabric"' in everything


@pytest.mark.parametrize("name", ["zeta-fabric"])
def test_what_it_writes_is_clean_and_typed(tmp_path: Path, name: str) -> None:
    folder = write_backend(name, tmp_path)
    environment = os.environ | {"MYPYPATH": str(Path(__file__).parents[2] / "core")}
    for command in (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]):
        whole = [sys.executable, "-m", *command]
        done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    folder = write_backend("zeta", tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=f"{folder} cannot be made.*nothing was written"):
        write_backend("zeta", tmp_path)
    assert (folder / "README.md").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="nothing was written"):
        write_backend("zeta", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "Acme", "1st", "a--b", "-a", "a-", "a.b", "../a", "a b", "ä", "a" * 41, "a\n"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="A backend's name has lower case letters"):
        write_backend(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ipc", "rdma", "loopback"])
def test_a_name_that_is_taken_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"The name '{name}' is that of a backend of weight-transfer"):
        write_backend(name, tmp_path)
    assert not list(tmp_path.iterdir())
