"""A new backend's package: complete, typed, and conforming before its author has changed a line.

The files under ``template/`` are those of a backend called ``acme``; writing one replaces the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.plugins.discovery import backends
from weight_transfer.plugins.manager import PUBLISHED

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_LONGEST = 40  # characters of a name


def write_backend(name: str, directory: Path) -> Path:
    """Write the package ``weight-transfer-<name>`` into ``directory`` and return its folder.

    Args:
        name: of the backend, as in a configuration: lower case letters, digits, and single ``-`` or ``_`` between them.
        directory: where the folder is made; it is made too if it does not exist.

    Raises:
        ConfigError: the name is not one, or is taken, or the folder exists; nothing was written.
    """
    _check(name)
    dashed, underscored = name.replace("_", "-"), name.replace("-", "_")
    folder = directory / f"weight-transfer-{dashed}"
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} cannot be made, because something of that name exists; nothing was written. "
            "Choose another name or --directory."
        ) from error
    names = {
        "weight-transfer-acme": f"weight-transfer-{dashed}",
        "weight_transfer_acme": f"weight_transfer_{underscored}",
        "Acme": "".join(part.capitalize() for part in dashed.split("-")),
        "acme": name,
    }
    for path, text in _template(files(__name__) / "template", ""):
        file = folder / _renamed(path, names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_renamed(text, names), encoding="utf-8")
    return folder


def _check(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise ConfigError(
            "A backend's name has lower case letters, digits, and single '-' or '_' between them, begins with a "
            f"letter and has at most {_LONGEST} characters, got {name!r}."
        )
    distribution = f"weight-transfer-{name.replace('_', '-')}"
    taken = {ref.name: ref.provider.distribution for ref in backends() if ref.provider.distribution != distribution}
    taken |= PUBLISHED
    if name in taken:
        raise ConfigError(f"The name {name!r} is that of a backend of {taken[name]}; choose another.")


def _template(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each file's path within the template, and its text."""
    for entry in folder.iterdir():
        if entry.is_dir():
            if not entry.name.startswith((".", "__pycache__")):  # what tools leave behind
                yield from _template(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_text(encoding="utf-8")


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub("|".join(names), lambda match: names[match[0]], text)
