"""What a user gets who installs the core and some plugins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weight_transfer import __version__

PROBE = Path(__file__).with_name("probe.py")
CORE = "weight-transfer"
PLUGINS = ["ipc", "nccl", "rdma"]
ALL = [CORE, *(f"{CORE}-{plugin}" for plugin in PLUGINS)]

LOOPBACK = {
    "name": "loopback",
    "module": "weight_transfer.testing.loopback.plugin",
    "distribution": CORE,
    "version": __version__,
}

MakeEnvironment = Callable[..., Any]


def listed(environment: Any) -> list[dict[str, str]]:
    backends: list[dict[str, str]] = json.loads(environment.run("weight-transfer", "backends", "--json"))
    return backends


def load(environment: Any, backend: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(environment.run("python", "-I", str(PROBE), backend))
    assert Path(answer["core"]).is_relative_to(environment.folder), "the environment sees the checkout"
    return answer


def plugin_packages(modules: list[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules if module.startswith("weight_transfer_")}


def test_the_core_alone_offers_the_reference_backend(environment: MakeEnvironment) -> None:
    clean = environment(CORE)
    assert listed(clean) == [LOOPBACK]
    assert load(clean, "loopback")["provider"] == f"weight-transfer {__version__} [{LOOPBACK['module']}]"


def test_the_name_of_a_plugin_that_is_not_installed_gets_its_install_line(environment: MakeEnvironment) -> None:
    answer = load(environment(CORE), "ipc")
    assert answer["error"] == "BackendNotFoundError"
    assert "pip install weight-transfer-ipc" in answer["message"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_one_plugin_beside_the_core_is_listed_and_loads(environment: MakeEnvironment, plugin: str) -> None:
    clean = environment(CORE, f"{CORE}-{plugin}")
    module = f"weight_transfer_{plugin}.plugin"
    ref = {"name": plugin, "module": module, "distribution": f"{CORE}-{plugin}", "version": __version__}
    assert sorted(listed(clean), key=lambda item: item["name"]) == sorted(
        [LOOPBACK, ref], key=lambda item: item["name"]
    )
    answer = load(clean, plugin)
    assert answer["name"] == plugin
    assert answer["provider"] == f"{CORE}-{plugin} {__version__} [{module}]"


@pytest.mark.parametrize("backend", ["loopback", *PLUGINS])
def test_loading_a_backend_imports_no_other_plugin_and_no_torch(environment: MakeEnvironment, backend: str) -> None:
    modules = load(environment(*ALL), backend)["modules"]
    assert plugin_packages(modules) == ({f"weight_transfer_{backend}"} if backend in PLUGINS else set())
    assert "torch" not in modules


def test_importing_the_core_imports_no_plugin_no_torch_and_no_metadata(environment: MakeEnvironment) -> None:
    modules = load(environment(*ALL), "loopback")["at_import"]
    assert not plugin_packages(modules)
    assert not {"torch", "importlib.metadata", "importlib_metadata"} & set(modules)


def test_four_backends_are_listed(environment: MakeEnvironment) -> None:
    assert len(listed(environment(*ALL))) == 4


@pytest.fixture
def crowded(environment: MakeEnvironment) -> Any:
    """Strangers' distributions beside ours: one that claims a taken name, one whose backends cannot be loaded."""
    return environment(CORE, f"{CORE}-ipc", "sample-clash", "sample-broken")


def test_what_cannot_be_loaded_is_listed_all_the_same(crowded: Any) -> None:
    names = sorted((item["name"], item["distribution"]) for item in listed(crowded))
    assert names == [
        ("broken", "sample-broken"),
        ("ipc", "sample-clash"),
        ("ipc", "weight-transfer-ipc"),
        ("loopback", "weight-transfer"),
        ("newer", "sample-broken"),
    ]


def test_two_providers_of_a_name_are_both_named_and_neither_is_imported(crowded: Any) -> None:
    answer = load(crowded, "ipc")
    assert answer["error"] == "BackendConflictError"
    assert f"weight-transfer-ipc {__version__} [weight_transfer_ipc.plugin]" in answer["message"]
    assert "sample-clash 1.0.0 [sample_clash.plugin]" in answer["message"]
    assert not {"weight_transfer_ipc", "sample_clash"} & set(answer["modules"])


def test_a_plugin_that_fails_to_import_is_named_with_its_cause(crowded: Any) -> None:
    answer = load(crowded, "broken")
    assert answer["error"] == "BackendLoadError"
    assert "sample-broken 1.0.0 [sample_broken.broken]" in answer["message"]
    assert "libsample.so.1: cannot open shared object file" in answer["message"]


def test_a_plugin_for_a_later_core_is_refused_with_both_versions(crowded: Any) -> None:
    answer = load(crowded, "newer")
    assert answer["error"] == "BackendVersionError"
    assert "sample-broken 1.0.0 [sample_broken.newer]" in answer["message"]
    assert "needs plugin API 3.0, this core offers 2.0 to 2.0" in answer["message"]


def test_a_sound_backend_loads_beside_broken_ones(crowded: Any) -> None:
    assert load(crowded, "loopback")["name"] == "loopback"
