"""How commands print: as wide as the terminal, or without one as wide as the text is; and that they work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNBOUNDED = 100_000  # columns


def console() -> Console:
    """Return where to print to: stdout, as it is now."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNBOUNDED)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal's standard error that something goes on; provide what changes the text."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False, markup=False).status(what) as status:
        yield status.update


def grid(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> Table:
    """Return a table without lines.

    Args:
        rows: a text for each column.
        header: names of the columns; none without.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_header=bool(header))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
