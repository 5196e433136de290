"""The ``weight-transfer`` command, as its user meets it: mostly in processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from weight_transfer.cli import main

COMMANDS = main.list_commands(click.Context(main))
BROKEN = "raise RuntimeError('its library is not here')\n"
PLUGIN = """
from weight_transfer.plugins.backend import API_VERSION, Backend, Probe
from weight_transfer.plugins.hookspecs import hookimpl

@hookimpl
def weight_transfer_backend():
    return Backend(
        name={name!r},
        api_version=API_VERSION,
        summary="for a test",
        worker_engine="a:B",
        trainer_engine="a:B",
        probe="{module}:probe",
        capabilities={capabilities!r},
    )

@hookimpl
def weight_transfer_diagnostics():
    return {{"fabric": "two ports"}}

def probe():
    reason, fix = "this machine has no such card", "Put one in."
    return Probe(available={available}, reason=reason, fix=fix, details={{"driver": "none"}})
"""


def command(*arguments: str, path: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **settings, **({"PYTHONPATH": str(path)} if path else {})}
    whole = [sys.executable, "-m", "weight_transfer", *arguments]
    return subprocess.run(whole, env=env, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def lacking(install):
    """A distribution whose backend says no on every machine."""
    text = PLUGIN.format(
        name="lacking", module="lacking_plugin", available=False, capabilities=["cpu", "cross-process"]
    )
    return install(
        "acme-lacking", {"weight_transfer.backends": {"lacking": "lacking_plugin"}}, {"lacking_plugin": text}
    )


def test_version_tells_where_every_plugin_comes_from() -> None:
    lines = command("--version").stdout.splitlines()
    assert lines[0] == "weight-transfer 0.1.0"
    assert "weight-transfer-ipc 0.1.0 [weight_transfer_ipc.plugin]" in lines
    assert "weight-transfer 0.1.0 [weight_transfer.observers.progress]" in lines


def test_backends_lists_names_and_providers() -> None:
    done = command("backends")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["NAME", "PROVIDED", "BY"]
    assert {"ipc", "loopback", "nccl", "rdma"} <= {line.split()[0] for line in lines}
    assert re.search(r"^ipc +weight-transfer-ipc 0\.1\.0 \[weight_transfer_ipc\.plugin\]$", done.stdout, re.MULTILINE)


def test_backends_json_is_for_programs() -> None:
    rows = json.loads(command("backends", "--json").stdout)
    assert {
        "name": "ipc",
        "module": "weight_transfer_ipc.plugin",
        "distribution": "weight-transfer-ipc",
        "version": "0.1.0",
    } in rows


@pytest.mark.usefixtures("lacking")
def test_check_asks_each_backend_whether_it_works_here() -> None:
    done = CliRunner().invoke(main, ["backends", "--check", "--json"])
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.exit_code == 0, "a backend that lacks something is reported, and is no failure"
    assert rows["loopback"]["available"] is True
    assert rows["loopback"]["error"] is None
    assert rows["lacking"]["available"] is False
    assert rows["lacking"]["reason"] == "this machine has no such card"
    assert rows["lacking"]["fix"] == "Put one in."
    assert rows["lacking"]["capabilities"] == ["cpu", "cross-process"]
    assert rows["lacking"]["diagnostics"] == {"driver": "none", "fabric": "two ports"}


@pytest.mark.usefixtures("lacking")
def test_check_shows_reason_fix_and_diagnostics() -> None:
    text = CliRunner().invoke(main, ["backends", "--check"]).stdout
    assert re.search(r"^lacking +acme-lacking 1\.0 \[lacking_plugin\] +unavailable +for a test$", text, re.MULTILINE)
    for note in ("this machine has no such card", "fix: Put one in.", "driver: none", "fabric: two ports"):
        assert re.search(rf"^ +{re.escape(note)}$", text, re.MULTILINE), note


def test_check_shows_the_error_of_a_broken_plugin_and_fails(install) -> None:
    install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": BROKEN})
    done = CliRunner().invoke(main, ["backends", "--check"])
    assert done.exit_code == 1
    assert re.search(r"^acme +acme 1\.0 \[acme_plugin\] +broken$", done.stdout, re.MULTILINE)
    assert "its library is not here" in done.stdout
    assert re.search(r"^loopback .* available ", done.stdout, re.MULTILINE), "the others are shown nevertheless"


def test_listing_reads_metadata_only(install) -> None:
    site = install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": BROKEN})
    done = command("backends", path=site)
    assert done.returncode == 0
    assert "acme 1.0 [acme_plugin]" in done.stdout


@pytest.mark.parametrize("arguments", [["backends"], ["backends", "--json"], ["--version"]])
def test_listing_imports_nothing_heavy(arguments: list[str]) -> None:
    whole = [sys.executable, "-X", "importtime", "-m", "weight_transfer", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=100, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "weight_transfer" in imported
    assert imported.isdisjoint({"torch", "rich", "httpx", "starlette", "transformers", "cattrs", "pluggy", "numpy"})
    assert not [name for name in imported if name.startswith("weight_transfer_")]


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help_with_an_example(arguments: list[str]) -> None:
    text = CliRunner().invoke(main, [*arguments, "--help"]).output
    assert "  Example:\n    weight-transfer " in text


def test_an_unknown_backend_is_one_sentence_that_names_the_installed_ones() -> None:
    done = command("demo", "--backend", "ipx")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1, "nothing but what the demo is about"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: No installed distribution provides the backend 'ipx'; installed are ")
    assert line.endswith("Did you mean 'ipc'?")


def test_a_wrong_config_is_one_sentence_that_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "sync.toml"
    file.write_text('[weight_transfer]\nbackend = "ipc"\ntimeuot = 3\n')
    done = command("demo", "--config", str(file))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "'timeuot'" in line and "'timeout'" in line


def test_the_demo_takes_the_backend_of_the_environment() -> None:
    done = command("demo", WEIGHT_TRANSFER_BACKEND="ipx")
    assert done.returncode == 2
    assert "'ipx'" in done.stderr


def test_the_demo_says_at_once_what_a_backend_lacks(lacking: Path) -> None:
    done = command("demo", "--backend", "lacking", path=lacking)
    assert done.returncode == 2
    assert "starting" not in done.stdout
    assert done.stderr == (
        "error: Backend 'lacking' (acme-lacking 1.0 [lacking_plugin]) cannot work on this machine: "
        "this machine has no such card. Put one in.\n"
    )


def test_the_demo_refuses_a_backend_that_moves_no_cpu_tensors(install) -> None:
    text = PLUGIN.format(name="acme", module="acme_plugin", available=True, capabilities=["cuda"])
    site = install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": text})
    done = command("demo", "--backend", "acme", path=site)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Backend 'acme' (acme 1.0 [acme_plugin]) moves no CPU tensors")


def test_the_demo_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer.demo.run.find_spec", lambda name: None if name == "transformers" else name)
    done = CliRunner().invoke(main, ["demo", "--plain"])
    assert done.exit_code == 2
    assert done.stderr == "error: The demo needs transformers: pip install 'weight-transfer[demo]'\n"


@pytest.mark.parametrize("option", ["--workers", "--steps", "--every"])
def test_counts_below_one_are_usage_errors(option: str) -> None:
    done = CliRunner().invoke(main, ["demo", option, "0"])
    assert done.exit_code == 2
    assert "x>=1" in done.output


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("bakends", "'bakends'; did you mean 'backends'?"),
        ("demos", "'demos'; did you mean 'demo'?"),
        ("send", f"'send'; there are {', '.join(COMMANDS)}."),
    ],
)
def test_an_unknown_command_suggests_one(typed: str, hint: str) -> None:
    done = CliRunner().invoke(main, [typed])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: No such command {hint}"


def on_a_terminal(*arguments: str, path: Path, columns: int) -> list[str]:
    """Return the lines that the command writes to a terminal of that width."""
    reader, terminal = os.openpty()
    whole = [sys.executable, "-m", "weight_transfer", *arguments]
    settings = os.environ | {"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}", "COLUMNS": str(columns)}
    data = b""
    with (
        os.fdopen(reader, "rb", buffering=0) as output,
        subprocess.Popen(whole, env=settings, stdin=subprocess.DEVNULL, stdout=terminal),
        suppress(OSError),  # EIO: the last writer is gone
    ):
        os.close(terminal)
        while part := output.read(4096):
            data += part
    return data.decode().splitlines()


@pytest.mark.parametrize("arguments", [["backends"], ["backends", "--check"], ["--help"], ["demo", "--help"]])
def test_everything_fits_a_terminal_of_sixty_columns(arguments: list[str], lacking: Path) -> None:
    lines = on_a_terminal(*arguments, path=lacking, columns=60)
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    if arguments[0] == "backends":
        assert re.search(r"^lacking( +unavailable)?\n +acme-lacking 1\.0 \[lacking_plugin\]$", text, re.MULTILINE)
    if "--check" in arguments:
        for note in ("this machine has no such card", "fix: Put one in.", "driver: none", "fabric: two ports"):
            assert re.search(rf"^ +{re.escape(note)}$", text, re.MULTILINE), note


def test_without_a_terminal_a_table_is_as_wide_as_it_must_be() -> None:
    text = command("backends", "--check", COLUMNS="60").stdout
    assert re.search(r"^loopback +weight-transfer \S+ \[\S+\] +available +\S", text, re.MULTILINE)


def test_the_demo_says_what_it_does_and_for_how_long_before_it_imports_anything() -> None:
    script = """if True:
        import sys
        import click
        from weight_transfer.cli import main
        echo = click.echo
        def listen(text, **options):
            echo(f"{text}|{sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:]))}", **options)
            sys.exit()
        click.echo = listen
        main(["demo", "--steps", "240"])
    """
    heavy = ["torch", "transformers", "rich", "cattrs", "httpx"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "Training a small Llama for 240 steps on the CPU: about 60 s on two cores.|[]\n"
