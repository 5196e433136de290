"""From an empty directory to a backend that conforms, with nothing but installed wheels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_new_backend_is_installed_passes_the_kit_and_runs_the_demo(new_environment: Callable[..., Any]) -> None:
    clean = new_environment("weight-transfer")
    clean.run("weight-transfer", "new", "acme")
    folder = clean.folder / "weight-transfer-acme"
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", f"{folder}")
    clean.run("python", *install)
    answer = clean.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), seconds=120)
    assert " passed" in answer and " failed" not in answer
    demo = clean.run("weight-transfer", "demo", "--backend", "acme", "--workers", "1", "--steps", "4", "--plain")
    assert "acme" in demo
