"""Fills the templates. All text that comes into one is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from weight_transfer.pages.phases import KNOWN, kind_of
from weight_transfer.pages.texts import duration, percent, rate
from weight_transfer.pages.tracks import track
from weight_transfer.values.report import sized


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: a file's name in ``templates``.
        values: what stands in it, by name.
    """
    return _environment().get_template(template).render(**values)


def fragment(template: str, macro: str, *arguments: Any) -> Markup:
    """Return a piece of a page, which may be put into another template as it is: what one of its macros makes."""
    return Markup(getattr(_environment().get_template(template).module, macro)(*arguments))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sized": sized, "duration": duration, "rate": rate, "percent": percent, "kind": kind_of}
    environment.globals |= {"known_phases": KNOWN, "track": track}
    return environment
