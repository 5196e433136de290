"""Fixtures for every kind of test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    for name in [name for name in os.environ if name.startswith("WEIGHT_TRANSFER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a fake distribution for the time of one test: its metadata and its modules, in a folder on ``sys.path``.

    ``install("acme", {"weight_transfer.backends": {"acme": "acme_plugin"}}, {"acme_plugin": "..."})``
    """
    modules_before = set(sys.modules)

    def _install(
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        folder: str | None = None,
    ) -> Path:
        site = tmp_path / "site" / (folder or name)
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = [
            [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
            for group, points in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(line for group in groups for line in group) + "\n")
        for module, text in (modules or {}).items():
            (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))
        return site

    yield _install
    for module in set(sys.modules) - modules_before:
        file = getattr(sys.modules[module], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[module]
