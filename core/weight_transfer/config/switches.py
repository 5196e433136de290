"""Switches in the environment: ``1`` or ``true`` is on; ``0``, ``false``, empty and unset are off. And a folder."""

from __future__ import annotations

import os
from pathlib import Path

from weight_transfer.errors import ConfigError

STRICT = "WEIGHT_TRANSFER_STRICT"
TRACE = "WEIGHT_TRANSFER_TRACE"
REPORT = "WEIGHT_TRANSFER_REPORT"


def strict() -> bool:
    """Whether an observer that fails is an error (``WEIGHT_TRANSFER_STRICT``)."""
    return _on(STRICT)


def tracing() -> bool:
    """Whether to log each hook call, and what a backend's libraries print (``WEIGHT_TRANSFER_TRACE``)."""
    return _on(TRACE)


def report_folder() -> Path:
    """Return where the observer ``report`` writes (``WEIGHT_TRANSFER_REPORT``); the working directory by default."""
    return Path(os.environ.get(REPORT) or ".")


def truth(text: str) -> bool:
    """Read a truth value as one writes it in a shell.

    Raises:
        ValueError: it is none of ``0``, ``1``, ``false`` and ``true``.
    """
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() in ("1", "true")


def _on(variable: str) -> bool:
    text = os.environ.get(variable)
    try:
        return bool(text) and truth(text or "")
    except ValueError as error:
        raise ConfigError(f"environment variable {variable}: {error}.") from error
