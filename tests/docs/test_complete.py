"""The documentation leaves nothing out, and describes nothing that is not there."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import groupby

import attrs
import click
import pytest

import weight_transfer
from support.pages import ROOT, table, text_of
from weight_transfer import errors, load_backend
from weight_transfer.cli import main
from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer.plugins import hookspecs
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.read_config import ENVIRONMENT
from weight_transfer.testing import BackendConformance

BACKENDS = ["ipc", "nccl", "rdma", "loopback"]
SOURCES = [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").glob("*/weight_transfer_*/**/*.py")]


def test_every_hook_is_described_with_its_signature() -> None:
    tree = ast.parse(inspect.getsource(hookspecs))
    signatures = {f"`{node.name}({ast.unparse(node.args)})`" for node in tree.body if isinstance(node, ast.FunctionDef)}
    rows = table("hooks.md", "hook")
    assert {row[0] for row in rows} == signatures
    assert all(all(row) for row in rows)


def test_every_error_has_a_cause_and_a_remedy() -> None:
    def named(cls: type) -> str:
        builtin = [f"(`{base.__name__}`)" for base in cls.__bases__ if base.__module__ == "builtins"]
        return " ".join([f"`{cls.__name__}`", *(builtin if cls is not errors.WeightTransferError else [])])

    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and cls.__module__ == errors.__name__]
    rows = table("errors.md", "class")
    assert {row[0] for row in rows} == {named(cls) for cls in classes}
    assert all(len(row) == 3 and all(row) for row in rows)


def keys_of(heading: str) -> set[str]:
    """Return the keys in the table of a section of the configuration page."""
    page = text_of("configuration.md")
    section = re.split(r"^##+ ", page.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert all(len(cell.strip("| ")) for row in rows for cell in row)
    return {row[0].strip("| `") for row in rows}


@pytest.mark.parametrize(
    ("heading", "cls"), [("Keys", WeightTransferConfig), ("Where a process stands", ParallelConfig)]
)
def test_every_configuration_key_is_documented(heading: str, cls: type) -> None:
    assert keys_of(heading) == {field.name for field in attrs.fields(cls)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_of_a_backend_is_documented(backend: str) -> None:
    options = load_backend(backend).parse_options({}, "test")
    expected = {field.name for field in attrs.fields(type(options))} if options is not None else set()
    assert keys_of(backend) == expected


def test_every_environment_variable_is_documented() -> None:
    used = {name for source in SOURCES for name in re.findall(r"WEIGHT_TRANSFER_[A-Z_]*[A-Z]\b", source.read_text())}
    documented = set(re.findall(r"`(WEIGHT_TRANSFER_[A-Z_]+)`", text_of("configuration.md")))
    assert documented == used | set(ENVIRONMENT.values()) | {"WEIGHT_TRANSFER_CONFIG"}


def test_every_command_and_option_is_documented() -> None:
    sections = {
        line: body for line, _, body in (part.partition("\n") for part in text_of("reference/cli.md").split("\n## "))
    }
    commands: dict[str, click.Command | None] = {"weight-transfer": main}
    with click.Context(main) as context:
        commands |= {name: main.get_command(context, name) for name in main.list_commands(context)}
    assert set(sections) - {"# Commands"} == set(commands)
    for name, command in commands.items():
        assert command is not None
        for option in (option for parameter in command.params for option in parameter.opts if option[0] == "-"):
            assert option in sections[name], f"{name} {option}"


def test_every_capability_is_documented_as_the_backends_declare_it() -> None:
    declared = {backend: load_backend(backend).backend.capabilities for backend in BACKENDS}
    rows = table("choose-a-backend.md", "capability")
    expected = {
        f"`{capability}`": ["yes" if capability in declared[backend] else "no" for backend in BACKENDS]
        for capability in Capability
    }
    assert {row[0]: row[2:] for row in rows} == expected
    assert all(row[1] for row in rows)


CORE = ROOT / "core" / "weight_transfer"


def test_the_table_of_modules_is_complete_and_imports_go_up() -> None:
    rows = [
        [f"{folder}.{name}".lstrip(".") for name in re.findall(r"`(\w+)`", row[1])] or [folder]
        for row in table("architecture.md", "folder of `weight_transfer`")
        for folder in [row[0].strip("`")]
    ]
    row_of = {name: index for index, names in enumerate(rows) for name in names}
    assert sum(map(len, rows)) == len(row_of), "a module stands in two rows"
    order = [folder for folder, _ in groupby(names[0].rpartition(".")[0] for names in rows) if folder]
    assert len(order) == len(set(order)), "the rows of a folder stand apart"
    modules = {".".join(path.relative_to(CORE).with_suffix("").parts): path for path in sorted(CORE.rglob("*.py"))}
    modules = {name: path for name, path in modules.items() if not name.startswith("__") and "template" not in name}
    assert not [name for name in row_of if name not in modules and f"{name}.__init__" not in modules]
    for module, path in modules.items():
        row = row_in(row_of, module)
        if row is None:
            assert path.name == "__init__.py", f"{module} stands in no row"
            assert not [*imports_of(ast.parse(path.read_text()))], f"{module} is more than a docstring"
            continue
        for imported in imports_of(ast.parse(path.read_text())):
            upper = row_in(row_of, imported)
            assert upper is not None and upper <= row, f"{module} imports {imported}, which stands below it"


def row_in(row_of: dict[str, int], module: str) -> int | None:
    """Return the row of a module or of the package that it lies in."""
    while module and module not in row_of:
        module = module.rpartition(".")[0]
    return row_of.get(module)


def imports_of(node: ast.AST) -> Iterator[str]:
    """Yield what is imported from the package when it runs, as paths below it, but public names of its root."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == CORE.name:
        below = node.module.removeprefix(CORE.name).removeprefix(".")
        for name in node.names:
            path = ".".join(filter(None, [below, name.name]))
            if below or (CORE / f"{path}.py").exists() or (CORE / path).is_dir():
                yield path
    for child in ast.iter_child_nodes(node):
        yield from imports_of(child)


def test_every_part_of_the_kit_is_documented() -> None:
    shown = re.findall(r"^::: .*\.(\w+Tests)$", (ROOT / "docs/reference/testing.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(part.__name__ for part in BackendConformance.__bases__)


def test_every_public_name_is_documented() -> None:
    reference = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    elsewhere = "".join(text_of(page) for page in ("errors.md", "configuration.md", "hooks.md"))
    homes: dict[str, str] = vars(weight_transfer)["_HOME"]
    for name, below in homes.items():
        home = f"{weight_transfer.__name__}.{below}"
        module = getattr(getattr(weight_transfer, name), "__module__", home)
        in_reference = shown & {home, module, f"{home}.{name}", f"{module}.{name}"}
        assert in_reference or f"`{name}`" in elsewhere or f".{name}`" in elsewhere, name
