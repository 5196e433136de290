"""How the phases of an update look in every page."""

from __future__ import annotations

import attrs


@attrs.frozen
class Look:
    """A colour, in light and in dark, and the phases that have it."""

    light: str
    dark: str
    phases: tuple[str, ...]


KNOWN = {
    "join": Look("#8250df", "#b794f6", ("init",)),
    "start": Look("#0969da", "#58a6ff", ("start",)),
    "plan": Look("#bf3989", "#f778ba", ("plan", "check")),
    "gather": Look("#0e8a9e", "#56d4dd", ("gather",)),
    "move": Look("#1a7f5a", "#3fb68b", ("wire", "update", "receive")),
    "load": Look("#5aa02c", "#8ddb66", ("load", "receive regions")),
    "verify": Look("#bc4c00", "#f0883e", ("verify",)),
    "wait": Look("#b3bac2", "#57606a", ("wait",)),
    "commit": Look("#9a6700", "#d9a53f", ("commit", "finish")),
    "other": Look("#6e7781", "#8b949e", ()),
}
"""By the class that they have in a page's style."""
_KINDS = {phase: kind for kind, look in KNOWN.items() for phase in look.phases}


def kind_of(phase: str) -> str:
    """Return the class of a phase."""
    return _KINDS.get(phase, "other")


def in_order(names: set[str]) -> list[str]:
    """Return names of phases in the order of an update, those that are not known at the end."""
    known = list(_KINDS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
