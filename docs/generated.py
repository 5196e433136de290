"""What the pages quote from the code when the site is built, so that it cannot be out of date; a hook of MkDocs.

A page asks for it with a comment on a line of its own:

    <!-- keys: weight_transfer.config.settings:WeightTransferConfig -->      a table of a configuration class
    <!-- command: weight-transfer backends -->                      what `--help` says
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
from typing import Any, Literal, get_args, get_origin

import attrs
import click
import griffe

from weight_transfer.cli import main
from weight_transfer.config.settings import WeightTransferConfig, to_bytes, to_seconds
from weight_transfer.plugins.read_config import ENVIRONMENT

_REQUEST = re.compile(r"^<!-- (keys|command): (.+) -->$", re.MULTILINE)
_TYPES: dict[Any, str] = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Any: "table"}

_UNITS: dict[Any, str] = {to_bytes: 'bytes, or text such as `"256MiB"`', to_seconds: "seconds"}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Answer the requests of a page; MkDocs calls it before it converts the page."""
    return _REQUEST.sub(lambda match: {"keys": keys, "command": command}[match[1]](match[2]), markdown)


def keys(reference: str) -> str:
    """Return the fields of an attrs class as a table: key, type with unit, default, environment variable, meaning.

    Raises:
        KeyError: the class's docstring says nothing of a field.
    """
    cls = attrs.resolve_types(pkgutil.resolve_name(reference))
    meanings = _meanings(cls)
    in_environment = cls is WeightTransferConfig
    rows = [["key", "type", "default", *(["environment variable"] if in_environment else []), "meaning"]]
    rows.append(["---"] * len(rows[0]))
    for field in attrs.fields(cls):
        variable = f"`{ENVIRONMENT[field.name]}`" if field.name in ENVIRONMENT else "none"
        middle = [variable] if in_environment else []
        rows.append([f"`{field.name}`", _type(field), _default(field), *middle, meanings[field.name]])
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def command(path: str) -> str:
    """Return what the command ``weight-transfer ...`` prints for ``--help``."""
    first, *names = path.split()
    found: click.Command = main
    settings: Any = {"max_content_width": 100, "terminal_width": 100}
    context = click.Context(found, info_name=first, **found.context_settings, **settings)
    for name in names:
        assert isinstance(found, click.Group)
        child = found.get_command(context, name)
        if child is None:
            raise KeyError(f"{path}: there is no command {name!r}")
        found = child
        context = click.Context(found, parent=context, info_name=name, **settings)
    return f"```text\n{found.get_help(context)}\n```"


def _meanings(cls: type[Any]) -> dict[str, str]:
    docstring = griffe.Docstring(inspect.getdoc(cls) or "")
    return {
        attribute.name: " ".join(attribute.description.split())
        for section in docstring.parse("google", warnings=False)
        if isinstance(section, griffe.DocstringSectionAttributes)
        for attribute in section.value
    }


def _type(field: attrs.Attribute[Any]) -> str:
    if field.converter in _UNITS:
        return _UNITS[field.converter]
    kinds = [kind for kind in get_args(field.type) if kind is not type(None)]
    if get_origin(field.type) is Literal:
        return ", ".join(f"`{json.dumps(kind)}`" for kind in kinds)
    if get_origin(field.type) is tuple:
        return "list of text"
    if get_origin(field.type) is dict:
        return "table of text"
    return _TYPES[kinds[0] if kinds else field.type]


def _default(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]  # attrs types it as a function
        return "empty"
    if _UNITS.get(field.converter, "").startswith("bytes"):
        return f'`"{field.default // 2**20}MiB"`'
    value = int(field.default) if isinstance(field.default, float) and field.default.is_integer() else field.default
    return f"`{json.dumps(value)}`"
