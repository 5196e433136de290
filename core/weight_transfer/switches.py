"""Switches in the environment: on, unless they are unset, empty or ``0``."""

from __future__ import annotations

import os


def strict() -> bool:
    """Whether an observer that fails is an error (``WEIGHT_TRANSFER_STRICT``)."""
    return _on("WEIGHT_TRANSFER_STRICT")


def tracing() -> bool:
    """Whether to log each hook call, and what a backend's libraries print (``WEIGHT_TRANSFER_TRACE``)."""
    return _on("WEIGHT_TRANSFER_TRACE")


def _on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")
