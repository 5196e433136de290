"""The documentation's Markdown, as tables and code blocks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import attrs
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", *sorted((ROOT / "plugins").glob("*/README.md"))]
MARK = re.compile(r"<!--\s*(run|file|not run)(?::\s*(.+?))?\s*-->")

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_spec = importlib.util.spec_from_file_location("generated", ROOT / "docs/generated.py")
assert _spec is not None and _spec.loader is not None
generated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generated)


@attrs.frozen
class Block:
    """A block of code: its language, title, line in the page, and the comment before it, such as ``run: worker``."""

    language: str
    title: str | None
    line: int
    code: str
    mark: str | None
    argument: str

    @property
    def quoted(self) -> bool:
        """Whether it shows a file of the repository, which is tested where it lies."""
        return self.code.lstrip().startswith('--8<-- "')


def text_of(page: str) -> str:
    """Return a page of docs/ with what the site's build puts into it."""
    rendered: str = generated.on_page_markdown((ROOT / "docs" / page).read_text())
    return rendered


def tables(markdown: str) -> list[list[list[str]]]:
    """Return all tables as rows of cells, header first."""
    found: list[list[list[str]]] = []
    for token in _MARKDOWN.parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1].append(token.content)
    return found


def table(page: str, column: str) -> list[list[str]]:
    """Return the body of the page's one table whose first column is headed so."""
    [found] = [rows for rows in tables(text_of(page)) if rows[0][0] == column]
    return found[1:]


def blocks(page: Path) -> list[Block]:
    """Return all code blocks of a page, in order."""
    found, mark = [], None
    for token in _MARKDOWN.parse(page.read_text()):
        if token.type == "html_block":
            mark = MARK.fullmatch(token.content.strip())
        elif token.type == "fence":
            assert token.map is not None
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="(.+?)"', rest)
            kind, argument = (mark[1], mark[2] or "") if mark else (None, "")
            found.append(Block(language, title[1] if title else None, token.map[0] + 1, token.content, kind, argument))
            mark = None
        elif token.type != "html_block":
            mark = None
    return found
