"""What the distributions contain and declare."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from configparser import ConfigParser
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from weight_transfer import __version__

ROOT = Path(__file__).parents[2]
PLUGINS = ["ipc", "nccl", "rdma"]
INTEGRATIONS = ["weight-transfer-ray", "weight-transfer-vllm"]
NAMES = ["weight-transfer", *(f"weight-transfer-{plugin}" for plugin in PLUGINS), *INTEGRATIONS]

Distribution = Callable[[str], Path]


class Wheel:
    """The files of a wheel and those of its ``.dist-info``."""

    def __init__(self, folder: Path) -> None:
        [path] = folder.glob("*.whl")
        self.package, version = path.name.split("-")[:2]
        self.info = f"{self.package}-{version}.dist-info"
        with ZipFile(path) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}

    def metadata(self) -> Message:
        return message_from_string(self.files[f"{self.info}/METADATA"].decode())

    def entry_points(self) -> dict[str, dict[str, str]]:
        parser = ConfigParser()
        parser.read_string(self.files[f"{self.info}/entry_points.txt"].decode())
        return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_holds_one_typed_package_with_its_licence_and_no_tests(distribution: Distribution, name: str) -> None:
    wheel = Wheel(distribution(name))
    assert {PurePosixPath(file).parts[0] for file in wheel.files} == {wheel.package, wheel.info}
    assert f"{wheel.package}/py.typed" in wheel.files
    assert wheel.files[f"{wheel.info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    ours = [file for file in wheel.files if not file.startswith("weight_transfer/scaffold/template/")]
    strays = [file for file in ours if "tests" in PurePosixPath(file).parts or file.endswith(".pyc")]
    assert not strays


@pytest.mark.parametrize("name", NAMES)
def test_an_sdist_holds_the_package_and_its_papers_only(distribution: Distribution, name: str) -> None:
    [path] = distribution(name).glob("*.tar.gz")
    with tarfile.open(path) as archive:
        top = {PurePosixPath(member).parts[1] for member in archive.getnames()}
    papers = {"LICENSE", "README.md", "PKG-INFO", "pyproject.toml"}
    code = {"core", "CHANGELOG.md"} if name == "weight-transfer" else {name.replace("-", "_")}
    assert top - {".gitignore"} == papers | code  # hatchling adds .gitignore by itself


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_says_what_it_is_and_for_whom(distribution: Distribution, name: str) -> None:
    metadata = Wheel(distribution(name)).metadata()
    assert metadata["Name"] == name
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"Homepage, https://pypi.org/project/{name}/" in metadata.get_all("Project-URL", [])
    assert metadata.get_payload()


def test_the_core_brings_numpy_without_which_torch_warns_at_its_import(distribution: Distribution) -> None:
    needed = Wheel(distribution("weight-transfer")).metadata().get_all("Requires-Dist", [])
    assert [line for line in needed if line.startswith("numpy") and "extra" not in line]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_needs_the_core_and_offers_one_backend(distribution: Distribution, plugin: str) -> None:
    wheel = Wheel(distribution(f"weight-transfer-{plugin}"))
    needed = [line for line in wheel.metadata().get_all("Requires-Dist", []) if "extra ==" not in line]
    transports = {"rdma": ["nixl-cu12>=1.5; sys_platform == 'linux'", "numpy>=1.26"]}
    assert sorted(needed) == [*transports.get(plugin, []), "weight-transfer<0.2,>=0.1"]
    assert wheel.entry_points() == {"weight_transfer.backends": {plugin: f"weight_transfer_{plugin}.plugin"}}


def test_the_core_offers_its_command_the_reference_backend_and_its_observers(
    distribution: Distribution,
) -> None:
    assert Wheel(distribution("weight-transfer")).entry_points() == {
        "console_scripts": {"weight-transfer": "weight_transfer.cli:main"},
        "weight_transfer.backends": {"loopback": "weight_transfer.testing.loopback.plugin"},
        "weight_transfer.observers": {
            "opentelemetry": "weight_transfer.observers.opentelemetry",
            "progress": "weight_transfer.observers.progress",
            "prometheus": "weight_transfer.observers.prometheus",
            "report": "weight_transfer.observers.report",
        },
    }
