"""From a name to a plugin: exactly one is loaded, and whatever is wrong with it says who and why."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weight_transfer import (
    BackendConflictError,
    BackendContractError,
    BackendLoadError,
    BackendNotFoundError,
    BackendUnavailableError,
    BackendVersionError,
    ParallelConfig,
    TransferStarted,
    WeightTransferConfig,
    WeightTransferError,
    backends,
    hookimpl,
    load_backend,
)
from weight_transfer.errors import PluginError
from weight_transfer.plugins.backend import API_VERSION, Backend, Capability
from weight_transfer.plugins.manager import add_observers

Install = Callable[..., Path]
BACKENDS = "weight_transfer.backends"
OBSERVERS = "weight_transfer.observers"
CONFIG = WeightTransferConfig(backend="acme")
PARALLEL = ParallelConfig()

IMPORTS = """
from weight_transfer.plugins.backend import API_VERSION, Backend, Probe
from weight_transfer.plugins.hookspecs import hookimpl
"""

FIELDS = {
    "name": "'acme'",
    "api_version": "API_VERSION",
    "summary": "'Acme fabric'",
    "worker_engine": "'acme_engine:Worker'",
    "trainer_engine": "'acme_engine:Trainer'",
}

ENGINES = """
from weight_transfer.engine import TrainerWeightTransferEngine, WeightTransferEngine

class Worker(WeightTransferEngine):
    def init_transfer_engine(self, init_info): ...
    def receive_weights(self, update_info, load_weights): ...
    def shutdown(self): ...

class Trainer(TrainerWeightTransferEngine):
    def open_endpoint(self, slots, deadline): ...
    def join_workers(self, deadline): ...
    def send_weights(self, source, manifest, deadline, progress): ...
    def shutdown(self): ...
"""


def plugin(returns: str | None = None, after: str = "", **fields: str) -> str:
    """Return the text of a plugin module; ``fields`` are expressions of the descriptor."""
    keywords = ", ".join(f"{key}={value}" for key, value in {**FIELDS, **fields}.items())
    answer = returns or f"Backend({keywords})"
    return f"{IMPORTS}\n@hookimpl\ndef weight_transfer_backend():\n    return {answer}\n{textwrap.dedent(after)}"


@pytest.fixture
def acme(install: Install) -> Callable[..., None]:
    """Install a backend called ``acme``."""

    def _acme(text: str, engines: str = ENGINES) -> None:
        install("acme", {BACKENDS: {"acme": "acme_plugin"}}, {"acme_plugin": text, "acme_engine": engines})

    return _acme


def refusal(kind: type[WeightTransferError], name: str = "acme") -> Any:
    with pytest.raises(kind) as caught:
        load_backend(name)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


def imported_by(code: str) -> set[str]:
    """Return the modules that ``code`` imports in a fresh interpreter."""
    probe = "import json, sys; before = set(sys.modules); {}; print(json.dumps(sorted(set(sys.modules) - before)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", probe.format(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


# Listing.


def test_backends_reads_metadata_and_imports_no_plugin(install: Install) -> None:
    install("bomb", {BACKENDS: {"bomb": "bomb_plugin"}}, {"bomb_plugin": "raise SystemExit('imported')"})
    modules = imported_by(
        "import weight_transfer; assert {'bomb', 'ipc', 'loopback'} <= {ref.name for ref in weight_transfer.backends()}"
    )
    assert "weight_transfer.plugins.discovery" in modules
    assert not {"bomb_plugin", "weight_transfer_ipc", "weight_transfer.testing", "torch", "pluggy"} & modules


def test_importing_the_package_reads_no_metadata() -> None:
    modules = imported_by("import weight_transfer")
    assert "weight_transfer" in modules
    unwanted = {"torch", "pluggy", "importlib.metadata", "importlib_metadata", "weight_transfer.plugins.discovery"}
    assert not unwanted & modules


def test_loading_one_backend_imports_no_other_and_no_transport(install: Install) -> None:
    install("bomb", {BACKENDS: {"bomb": "bomb_plugin"}}, {"bomb_plugin": "raise SystemExit('imported')"})
    modules = imported_by("import weight_transfer; weight_transfer.load_backend('ipc')")
    assert "weight_transfer_ipc.plugin" in modules
    assert (
        not {"bomb_plugin", "weight_transfer.testing", "weight_transfer_nccl", "weight_transfer_rdma", "torch"}
        & modules
    )


def test_a_listed_backend_tells_its_provenance(install: Install) -> None:
    install("acme", {BACKENDS: {"acme": "acme_plugin"}}, version="2.3")
    (ref,) = [ref for ref in backends() if ref.name == "acme"]
    assert str(ref.provider) == "acme 2.3 [acme_plugin]"


def test_what_is_installed_and_removed_meanwhile_is_noticed(install: Install) -> None:
    def listed(tick: int) -> set[str]:
        os.utime(site, (tick, tick))  # file systems count time by ticks, some by seconds
        return {ref.name for ref in backends()} & {"acme", "zeta"}

    site = install("acme", {BACKENDS: {"acme": "acme_plugin"}})
    assert listed(1) == {"acme"}
    info = site / "zeta-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zeta\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{BACKENDS}]\nzeta = zeta_plugin\n")
    assert listed(2) == {"acme", "zeta"}
    shutil.rmtree(info)
    assert listed(3) == {"acme"}


# Loading.


def test_loopback_is_loaded_with_its_descriptor_and_its_provenance() -> None:
    loaded = load_backend("loopback")
    assert loaded.name == loaded.backend.name == "loopback"
    assert loaded.backend.api_version == API_VERSION
    assert Capability.CPU in loaded.backend.capabilities
    assert loaded.provider.distribution == "weight-transfer"
    assert loaded.provider.module == "weight_transfer.testing.loopback.plugin"
    assert loaded.probe().available


def test_the_engines_are_created_from_the_descriptor(acme: Callable[..., None]) -> None:
    acme(plugin())
    loaded = load_backend("acme")
    worker, trainer = loaded.create_worker_engine(CONFIG, PARALLEL), loaded.create_trainer_engine(CONFIG, PARALLEL)
    assert (type(worker).__name__, type(trainer).__name__) == ("Worker", "Trainer")
    assert worker.config is CONFIG
    assert trainer.parallel_config is PARALLEL


def test_every_load_gives_a_fresh_set_of_listeners() -> None:
    first, second = load_backend("loopback"), load_backend("loopback")
    first.plugins.register(Recorder())
    assert len(first.plugins.get_plugins()) == 2
    assert len(second.plugins.get_plugins()) == 1


def test_an_unknown_name_lists_what_is_installed_and_suggests_the_nearest() -> None:
    error = refusal(BackendNotFoundError, "lopback")
    assert error.name == "lopback"
    assert {"ipc", "loopback"} <= set(error.installed)
    assert (
        f"No installed distribution provides the backend 'lopback'; installed are {', '.join(error.installed)}."
        in str(error)
    )
    assert str(error).endswith("Did you mean 'loopback'?")
    assert "pip install" not in str(error)


def test_a_name_like_no_other_gets_neither_a_guess_nor_a_pip_line() -> None:
    error = refusal(BackendNotFoundError, "carrier-pigeon")
    assert error.hint == ""
    assert "Did you mean" not in str(error)
    assert "pip install" not in str(error)


@pytest.mark.parametrize("name", ["nccl", "ipc", "rdma"])
def test_only_a_name_that_we_publish_gets_a_pip_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        "weight_transfer.plugins.manager.entry_points", lambda group, name=None: ()
    )  # as if nothing were installed
    error = refusal(BackendNotFoundError, name)
    assert str(error).endswith(f"installed are none. Install it with: pip install weight-transfer-{name}")


def test_two_providers_of_one_name_are_both_named(install: Install) -> None:
    install("acme", {BACKENDS: {"acme": "acme_plugin"}}, {"acme_plugin": plugin()})
    install("rival", {BACKENDS: {"acme": "rival_plugin"}}, {"rival_plugin": plugin()}, version="3.0")
    error = refusal(BackendConflictError)
    assert error.providers == ("acme 1.0 [acme_plugin]", "rival 3.0 [rival_plugin]")
    assert "provided by acme 1.0 [acme_plugin] and by rival 3.0 [rival_plugin]; uninstall all but one" in str(error)


def test_a_rival_of_a_name_that_was_not_asked_for_is_in_nobodys_way(install: Install) -> None:
    install("acme", {BACKENDS: {"acme": "acme_plugin"}})
    install("rival", {BACKENDS: {"acme": "rival_plugin"}})
    assert load_backend("loopback").name == "loopback"


def test_one_distribution_that_is_seen_twice_is_no_conflict(install: Install) -> None:
    for folder in ("wheel", "editable"):
        site = install("acme", {BACKENDS: {"acme": "acme_plugin"}}, {"acme_plugin": plugin()}, folder=folder)
        with (site / "acme-1.0.dist-info" / "entry_points.txt").open("a") as metadata:
            metadata.write("acme = acme_plugin\n")
    assert [ref.name for ref in backends()].count("acme") == 1
    assert load_backend("acme").name == "acme"


# Broken plugins.


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import acme_driver", "ModuleNotFoundError: No module named 'acme_driver'"),
        (
            "raise OSError('libacme.so: cannot open shared object file')",
            "OSError: libacme.so: cannot open shared object file",
        ),
        ("def weight_transfer_backend(:", "SyntaxError: "),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
def test_a_plugin_that_fails_to_import_says_who_and_why(acme: Callable[..., None], text: str, cause: str) -> None:
    acme(text)
    error = refusal(BackendLoadError)
    assert error.reason.startswith(cause)
    assert "Backend 'acme' (acme 1.0 [acme_plugin]) cannot be loaded: its module fails to import. (cause: " in str(
        error
    )
    assert cause in str(error)
    assert error.__cause__ is not None


def test_an_entry_point_to_a_module_that_does_not_exist_says_so(install: Install) -> None:
    install("acme", {BACKENDS: {"acme": "acme_nowhere"}})
    assert "No module named 'acme_nowhere'" in str(refusal(BackendLoadError))


@pytest.mark.parametrize("text", [plugin(returns="{'name': 'acme'}"), plugin(returns="'acme'")])
def test_a_plugin_that_returns_something_else_breaks_the_contract(acme: Callable[..., None], text: str) -> None:
    acme(text)
    error = refusal(BackendContractError)
    assert "acme 1.0 [acme_plugin]" in str(error)
    assert "weight_transfer_backend must return a Backend, got " in error.reason


@pytest.mark.parametrize("text", [plugin(returns="None"), IMPORTS])
def test_a_plugin_that_returns_nothing_breaks_the_contract(acme: Callable[..., None], text: str) -> None:
    acme(text)
    assert refusal(BackendContractError).reason == "weight_transfer_backend must return a Backend, got NoneType"


def test_a_descriptor_of_another_name_breaks_the_contract(acme: Callable[..., None]) -> None:
    acme(plugin(name="'acne'"))
    assert refusal(BackendContractError).reason == "its descriptor is called 'acne', its entry point 'acme'"


def test_an_unknown_hook_breaks_the_contract(acme: Callable[..., None]) -> None:
    acme(plugin(after="@hookimpl\ndef weight_transfer_finishd(event): ...\n"))
    error = refusal(BackendContractError)
    assert "acme 1.0 [acme_plugin]" in str(error)
    assert "unknown hook 'weight_transfer_finishd'" in error.reason


def test_a_hook_with_unknown_parameters_breaks_the_contract(acme: Callable[..., None]) -> None:
    acme(plugin(after="@hookimpl\ndef weight_transfer_finished(report): ...\n"))
    error = refusal(BackendContractError)
    assert "'report'" in error.reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "'Acme Fabric'"}, "Backend.name must be lower case letters"),
        (
            {"worker_engine": "'acme_engine.Worker'"},
            "Backend.worker_engine must be 'module:Class', got 'acme_engine.Worker'",
        ),
        ({"options": "42"}, "Backend.options must be 'module:Class', got 42"),
        ({"api_version": "'1.0'"}, "Backend.api_version must be (major, minor)"),
        ({"api_version": "(1,)"}, "Backend.api_version must be (major, minor), got (1,)"),
        ({"capabilities": "{'teleport'}"}, "'teleport' is not a valid Capability"),
        ({"speed": "9000"}, "'speed'"),
    ],
)
def test_a_wrong_descriptor_names_the_field(acme: Callable[..., None], fields: dict[str, str], words: str) -> None:
    acme(plugin(**fields))
    error = refusal(BackendLoadError)
    assert "its weight_transfer_backend hook failed" in str(error)
    assert words in error.reason


@pytest.mark.parametrize(
    ("wanted", "fix"),
    [("(2, 99)", "upgrade weight-transfer"), ("(3, 0)", "upgrade weight-transfer"), ("(1, 0)", "upgrade acme")],
)
def test_a_plugin_of_another_api_says_which_side_to_upgrade(acme: Callable[..., None], wanted: str, fix: str) -> None:
    acme(plugin(api_version=wanted))
    error = refusal(BackendVersionError)
    assert error.wanted == tuple(map(int, wanted.strip("()").split(",")))
    assert error.window == f"{API_VERSION[0]}.0 to {API_VERSION[0]}.{API_VERSION[1]}"
    assert "(acme 1.0 [acme_plugin]) needs plugin API " in str(error)
    assert str(error).endswith(f": {fix}.")


@pytest.mark.parametrize(
    ("reference", "engines", "cause"),
    [
        ("'acme_engine:Wroker'", ENGINES, "AttributeError: "),
        ("'acme_nowhere:Worker'", ENGINES, "ModuleNotFoundError: No module named 'acme_nowhere'"),
        (
            "'acme_engine:Worker'",
            "raise OSError('libacme.so: wrong ELF class')",
            "OSError: libacme.so: wrong ELF class",
        ),
    ],
)
def test_an_engine_that_cannot_be_imported_says_which_and_why(
    acme: Callable[..., None], reference: str, engines: str, cause: str
) -> None:
    acme(plugin(worker_engine=reference), engines)
    loaded = load_backend("acme")
    with pytest.raises(BackendLoadError) as caught:
        loaded.create_worker_engine(CONFIG, PARALLEL)
    assert f"(acme 1.0 [acme_plugin]) cannot be loaded: cannot import {reference.strip(chr(39))}." in str(caught.value)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("'acme_engine:Trainer'", "acme_engine:Trainer must be a subclass of WeightTransferEngine"),
        ("'json:dumps'", "json:dumps must be a subclass of WeightTransferEngine"),
        ("'acme_engine:Half'", "acme_engine:Half does not implement init_transfer_engine, receive_weights"),
    ],
)
def test_an_engine_that_is_none_breaks_the_contract(acme: Callable[..., None], reference: str, reason: str) -> None:
    acme(
        plugin(worker_engine=reference), f"{ENGINES}\nclass Half(WeightTransferEngine):\n    def shutdown(self): ...\n"
    )
    with pytest.raises(BackendContractError) as caught:
        load_backend("acme").create_worker_engine(CONFIG, PARALLEL)
    assert caught.value.reason == reason
    assert "acme 1.0 [acme_plugin]" in str(caught.value)


def test_an_info_that_takes_a_field_of_the_cores_breaks_the_contract(acme: Callable[..., None]) -> None:
    """The core would overwrite it, or be overwritten."""
    infos = """
import attrs
from weight_transfer.model.info import WeightTransferInitInfo

@attrs.frozen(kw_only=True)
class Info(WeightTransferInitInfo):
    session: str
    port: int

Worker.init_info_cls = Info
"""
    acme(plugin(), f"{ENGINES}\n{infos}")
    with pytest.raises(
        BackendContractError, match="Info declares 'session', which the core's own infos have; rename it"
    ):
        load_backend("acme").create_worker_engine(CONFIG, PARALLEL)


def test_a_trainers_engine_of_the_wrong_kind_breaks_the_contract(acme: Callable[..., None]) -> None:
    acme(plugin(trainer_engine="'acme_engine:Worker'"))
    with pytest.raises(
        BackendContractError, match="acme_engine:Worker must be a subclass of TrainerWeightTransferEngine"
    ):
        load_backend("acme").create_trainer_engine(CONFIG, PARALLEL)


def test_a_machine_that_the_probe_refuses_gets_no_engine(acme: Callable[..., None]) -> None:
    acme(
        plugin(
            probe="'acme_plugin:probe'",
            after="""
            def probe():
                return Probe(available=False, reason="no Acme card was found", fix="Insert one.")
            """,
        ),
        "raise AssertionError('the engine must not be imported')",
    )
    loaded = load_backend("acme")
    assert not loaded.probe().available
    for create in (loaded.create_worker_engine, loaded.create_trainer_engine):
        with pytest.raises(BackendUnavailableError) as caught:
            create(CONFIG, PARALLEL)
        assert (caught.value.reason, caught.value.fix) == ("no Acme card was found", "Insert one.")
        assert str(caught.value) == (
            "Backend 'acme' (acme 1.0 [acme_plugin]) cannot work on this machine: no Acme card was found. Insert one."
        )


def test_a_probe_that_answers_something_else_breaks_the_contract(acme: Callable[..., None]) -> None:
    acme(plugin(probe="'acme_plugin:probe'", after="def probe(): return True\n"))
    with pytest.raises(BackendContractError, match="its probe must return a Probe, got bool"):
        load_backend("acme").probe()


def test_a_probe_that_raises_is_the_plugins_fault(acme: Callable[..., None]) -> None:
    acme(plugin(probe="'acme_plugin:probe'", after="def probe(): raise OSError('no /dev/acme')\n"))
    with pytest.raises(BackendLoadError) as caught:
        load_backend("acme").probe()
    assert "its probe failed" in str(caught.value)
    assert "OSError: no /dev/acme" in str(caught.value)


# Listeners.


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    @hookimpl
    def weight_transfer_started(self, event: object) -> None:
        self.heard.append(event)

    @hookimpl
    def weight_transfer_diagnostics(self) -> dict[str, str]:
        return {"recorder": f"{len(self.heard)} events"}


class Failing(Recorder):
    @hookimpl
    def weight_transfer_started(self, event: object) -> None:
        super().weight_transfer_started(event)
        raise RuntimeError("the dashboard is down")


STARTED = TransferStarted(role="trainer", backend="loopback", version=1, nbytes=1, params=1, workers=1)

LISTENER = """
from weight_transfer.plugins.hookspecs import hookimpl
heard = []

@hookimpl
def weight_transfer_started(event):
    heard.append(event)
"""


@pytest.fixture
def ear(install: Install) -> str:
    """Install an observer called ``ear``."""
    install("ear", {OBSERVERS: {"ear": "ear_module"}}, {"ear_module": LISTENER})
    return "ear_module"


def observers_of(names: tuple[str, ...], *objects: object) -> Any:
    loaded = load_backend("loopback")
    add_observers(loaded, names, objects)
    return loaded


def test_an_observer_is_called_if_the_config_names_it(ear: str) -> None:
    observers_of(()).notify("weight_transfer_started", STARTED)
    assert ear not in sys.modules
    observers_of(("ear",)).notify("weight_transfer_started", STARTED)
    assert sys.modules[ear].heard == [STARTED]


def test_an_observer_with_two_implementations_of_a_hook_hears_once_by_each() -> None:
    heard: list[str] = []

    class Twice:
        @hookimpl(specname="weight_transfer_started")
        def log(self, event: object) -> None:
            heard.append("log")

        @hookimpl(specname="weight_transfer_started")
        def count(self, event: object) -> None:
            heard.append("count")

    observers_of((), Twice()).notify("weight_transfer_started", STARTED)
    assert sorted(heard) == ["count", "log"]


def test_the_environment_replaces_the_list_of_observers(ear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_OBSERVERS", " ear ,")
    observers_of(("somebody-else",)).notify("weight_transfer_started", STARTED)
    assert sys.modules[ear].heard == [STARTED]


def test_an_empty_list_in_the_environment_means_nobody(ear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_OBSERVERS", "")
    observers_of(("ear",)).notify("weight_transfer_started", STARTED)
    assert ear not in sys.modules


def test_an_unknown_observer_is_a_warning_that_names_the_nearest(ear: str, caplog: pytest.LogCaptureFixture) -> None:
    observers_of(("eer", "ear")).notify("weight_transfer_started", STARTED)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "observer 'eer' is skipped" in caplog.text
    assert "did you mean 'ear'?" in caplog.text
    assert sys.modules[ear].heard == [STARTED]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise OSError('no display')", "no display"),
        (f"{LISTENER}\n@hookimpl\ndef weight_transfer_finishd(event): ...\n", "unknown hook 'weight_transfer_finishd'"),
        (f"{LISTENER}\n@hookimpl\ndef weight_transfer_finished(report): ...\n", "'report'"),
    ],
)
def test_a_broken_observer_is_skipped_with_its_cause(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    install("ear", {OBSERVERS: {"ear": "ear_module"}}, {"ear_module": text})
    loaded = observers_of(("ear",))
    assert "observer 'ear' is skipped" in caplog.text
    assert words in caplog.text
    assert len(loaded.plugins.get_plugins()) == 1
    monkeypatch.setenv("WEIGHT_TRANSFER_STRICT", "1")
    with pytest.raises((PluginError, OSError)) as caught:
        observers_of(("ear",))
    assert words in str(caught.value)


def test_two_providers_of_one_observer_are_both_named(
    ear: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("ear-too", {OBSERVERS: {"ear": "ear_too_module"}}, {"ear_too_module": LISTENER})
    observers_of(("ear",))
    assert "ear 1.0 [ear_module] and ear-too 1.0 [ear_too_module]" in caplog.text


def test_the_callers_own_observer_with_an_unknown_hook_is_an_error() -> None:
    class Deaf:
        @hookimpl
        def weight_transfer_strated(self, event: object) -> None: ...

    with pytest.raises(PluginError, match="unknown hook 'weight_transfer_strated'"):
        observers_of((), Deaf())


def test_a_failing_observer_is_logged_once_and_not_called_again(caplog: pytest.LogCaptureFixture) -> None:
    failing, healthy = Failing(), Recorder()
    loaded = observers_of((), failing, healthy)
    for _ in range(3):
        loaded.notify("weight_transfer_started", STARTED)
    assert (len(failing.heard), len(healthy.heard)) == (1, 3)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "failed in weight_transfer_started and is not called again" in caplog.text
    assert "the dashboard is down" in caplog.text


def test_a_failing_observer_is_logged_with_its_provenance(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    text = f"{LISTENER}    raise RuntimeError('the dashboard is down')\n"
    install("ear", {OBSERVERS: {"ear": "ear_module"}}, {"ear_module": text}, version="4.5")
    observers_of(("ear",)).notify("weight_transfer_started", STARTED)
    assert "observer ear 4.5 [ear_module] failed" in caplog.text


def test_in_strict_mode_an_observers_failure_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_STRICT", "1")
    loaded = observers_of((), Failing())
    with pytest.raises(RuntimeError, match="the dashboard is down"):
        loaded.notify("weight_transfer_started", STARTED)
    with pytest.raises(PluginError, match="No observer is called 'nobody'"):
        observers_of(("nobody",))


def test_strict_mode_can_be_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_TRANSFER_STRICT", "0")
    failing = Failing()
    observers_of((), failing).notify("weight_transfer_started", STARTED)
    assert len(failing.heard) == 1


def test_diagnostics_are_collected_from_everybody() -> None:
    assert observers_of((), Recorder()).diagnostics() == {"recorder": "0 events"}


# The descriptor.


def test_capabilities_are_taken_as_text_too() -> None:
    fields = {"name": "acme", "api_version": [1, 0], "summary": "", "worker_engine": "a:B", "trainer_engine": "a:B"}
    assert Backend(**fields, capabilities={"cpu"}).capabilities == {Capability.CPU}
    with pytest.raises(ValueError, match="teleport"):
        Backend(**fields, capabilities={"teleport"})
