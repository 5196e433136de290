"""What one backend says of itself and of this machine; what goes wrong is part of the answer."""

from __future__ import annotations

from typing import Any

import attrs

from weight_transfer.errors import WeightTransferError
from weight_transfer.plugins.backend import Verdict
from weight_transfer.plugins.manager import load_backend

Findings = dict[str, Any]
"""JSON-safe."""


def probed(name: str) -> Findings:
    """Load and probe a backend.

    Returns:
        ``available``, ``reason`` and ``fix`` of its probe; ``summary``, ``capabilities``, and ``diagnostics`` by title;
        ``error``: a sentence if it cannot be loaded, else None.
    """
    found: Findings = {"available": False, "reason": None, "fix": None, "capabilities": [], "summary": None}
    found |= {"diagnostics": {}, "error": None}
    try:
        loaded = load_backend(name)
        found["summary"] = loaded.backend.summary
        found["capabilities"] = sorted(loaded.backend.capabilities)
        probe = loaded.probe()
        found |= {"available": probe.available, "reason": probe.reason, "fix": probe.fix or None}
        found["diagnostics"] = probe.details | loaded.diagnostics()
    except WeightTransferError as error:
        found |= {"available": False, "error": str(error)}
    except Exception as error:  # noqa: BLE001  (a plugin's diagnostics may raise anything; the others are shown)
        found |= {"available": False, "error": f"Its diagnostics failed: {type(error).__name__}: {error}"}
    return found


def examined(name: str) -> Findings:
    """Load and probe a backend, and run its checks.

    Returns:
        As `probed`, and ``checks``: a list of ``title``, ``verdict``, ``found`` and ``fix``.
    """
    found = probed(name) | {"checks": []}
    if found["error"] is None:
        try:
            found["checks"] = [attrs.asdict(check) for check in load_backend(name).checks()]
        except Exception as error:  # noqa: BLE001  (as above)
            found["error"] = f"Its checks failed: {type(error).__name__}: {error}"
    return found


def can_run(found: Findings) -> bool:
    """Return whether a backend that was examined will work: it loads, its probe says yes, and no check says no."""
    checks = found["checks"]
    return found["available"] and not found["error"] and all(check["verdict"] != Verdict.BROKEN for check in checks)
