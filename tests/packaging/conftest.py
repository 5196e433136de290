"""Wheels of this repository, and environments that hold these wheels and third-party packages, nothing else of it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {
    "weight-transfer": ROOT,
    "weight-transfer-ipc": ROOT / "plugins/ipc",
    "weight-transfer-nccl": ROOT / "plugins/nccl",
    "weight-transfer-rdma": ROOT / "plugins/rdma",
    "weight-transfer-ray": ROOT / "integrations/ray",
    "weight-transfer-vllm": ROOT / "integrations/vllm",
    "sample-broken": ROOT / "tests/sample_backend/broken",
    "weight-transfer-sample": ROOT / "tests/sample_backend/files",
    "sample-clash": ROOT / "tests/sample_backend/clash",
}


def run(*command: str | Path, cwd: Path, seconds: float = 100) -> str:
    """Run a command outside the repository, free of settings that leak code or options in; return its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "WEIGHT_TRANSFER_"))}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


class Environment:
    """A virtual environment with the third-party packages of this one, by link, and wheels installed by pip.

    The links spare a download of torch. Nothing whose name contains ``weight_transfer`` is linked, so that neither an
    editable install of this repository nor another plugin is seen. pip checks the wheels' dependencies as for a user.
    """

    def __init__(self, folder: Path, wheels: list[Path]) -> None:
        self.folder = folder
        venv.create(folder, symlinks=True)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(source).iterdir():
                if "weight_transfer" not in entry.name and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
        self.run("python", "-m", "pip", "install", "--quiet", "--no-index", *map(str, wheels))

    def run(self, program: str, *arguments: str, seconds: float = 100) -> str:
        """Run one of the environment's own programs and return its output."""
        return run(self.folder / "bin" / program, *arguments, cwd=self.folder, seconds=seconds)


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a distribution as a release does, the wheel from the sdist; return the folder that holds both."""

    @functools.cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, PROJECTS[name], cwd=folder)
        return folder

    return build


@pytest.fixture(scope="session")
def new_environment(
    distribution: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Environment]:
    """Make a clean environment that holds the wheels of the named distributions, and that may be changed."""

    def make(*names: str) -> Environment:
        wheels = [next(distribution(name).glob("*.whl")) for name in names]
        return Environment(tmp_path_factory.mktemp("environment"), wheels)

    return make


@pytest.fixture(scope="session")
def environment(new_environment: Callable[..., Environment]) -> Callable[..., Environment]:
    """The same, made once for each set of names; not to be changed."""
    return functools.cache(new_environment)
