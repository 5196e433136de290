"""The phases of one process as pieces of a bar. Plain Python, for a page may have ten thousand."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

from weight_transfer.pages.phases import kind_of
from weight_transfer.pages.texts import duration

Span = tuple[str, float, float]
"""A phase, when it began and how long it took, in seconds."""


def track(spans: Iterable[Span], failed: bool = False) -> Markup:
    """Return a bar; how many seconds its width stands for is ``--whole``, which the style of what is around it sets.

    Args:
        spans: do not overlap.
        failed: whether it ends with a mark.
    """
    pieces, said, end = [], [], 0.0
    for phase, begin, seconds in spans:
        text = str(escape(f"{phase} {duration(seconds)}"))
        pieces.append(f'<i class="{kind_of(phase)}" style="--b:{begin:.6g};--s:{seconds:.6g}" title="{text}"></i>')
        said.append(text)
        end = begin + seconds
    if failed:
        pieces.append(f'<i class="bad" style="--b:{end:.6g};--s:0" title="failed"></i>')
        said.append("failed")
    label = ", ".join(said)
    return Markup(f'<div class="track" role="img" aria-label="{label}">{"".join(pieces)}</div>')
