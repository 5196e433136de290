"""What backends import from the core: three modules, one of which imports each of its names when it is first used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weight_transfer
from weight_transfer import authoring

ROOT = Path(__file__).parents[2]
ALLOWED = {f"weight_transfer.{name}" for name in ("authoring", "engine", "errors")}
BACKENDS = [
    *sorted(ROOT.glob("plugins/*/weight_transfer_*")),
    *sorted(ROOT.glob("examples/*/weight_transfer_*")),
    *sorted(ROOT.glob("core/weight_transfer/scaffold/template/weight_transfer_*")),
    *sorted(ROOT.glob("tests/sample_backend/*/sample_*")),
]


PUBLIC = {
    *ALLOWED,
    "weight_transfer",
    "weight_transfer.control",
    *(f"weight_transfer.{name}" for name in vars(weight_transfer)["__all__"]),
}
INTEGRATIONS = sorted(ROOT.glob("integrations/*/weight_transfer_*"))


def foreign_imports(path: Path, allowed: set[str] = ALLOWED) -> Iterator[str]:
    """Yield each import of a file from a module of the core that it should not know, with its place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            root = node.module == "weight_transfer"
            modules = [f"{node.module}.{alias.name}" for alias in node.names] if root else [node.module]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] == "weight_transfer" and module not in allowed:
                yield f"{path}:{node.lineno}: {module}"


def test_the_backends_are_found() -> None:
    names = {path.name for path in BACKENDS}
    assert {f"weight_transfer_{name}" for name in ("acme", "ipc", "nccl", "rdma", "zeromq")} | {
        "sample_backend"
    } <= names


@pytest.mark.parametrize("package", BACKENDS, ids=lambda path: path.name)
def test_a_backend_imports_what_is_meant_for_backends_only(package: Path) -> None:
    found = [line for path in sorted(package.rglob("*.py")) for line in foreign_imports(path)]
    assert not found, "\n".join(["import from weight_transfer.authoring instead:", *found])


@pytest.mark.parametrize("package", INTEGRATIONS, ids=lambda path: path.name)
def test_an_integration_imports_public_modules_only(package: Path) -> None:
    found = [line for path in sorted(package.rglob("*.py")) for line in foreign_imports(path, PUBLIC)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "line", "module"),
    [
        ("from weight_transfer.model.manifest import Manifest", 1, "weight_transfer.model.manifest"),
        ("import os\nimport weight_transfer.values.deadline as deadline", 2, "weight_transfer.values.deadline"),
        ("from weight_transfer import model", 1, "weight_transfer.model"),
        ("def late():\n    import weight_transfer", 2, "weight_transfer"),
        (
            "if TYPE_CHECKING:\n    from weight_transfer.model.source import WeightSource",
            2,
            "weight_transfer.model.source",
        ),
    ],
)
def test_an_import_from_elsewhere_is_told_with_its_place(tmp_path: Path, code: str, line: int, module: str) -> None:
    path = tmp_path / "engine.py"
    path.write_text(code)
    assert [*foreign_imports(path)] == [f"{path}:{line}: {module}"]


def test_what_is_meant_for_backends_passes(tmp_path: Path) -> None:
    path = tmp_path / "engine.py"
    path.write_text(
        "import weight_transfer_acme\nimport weight_transfer.errors\nfrom weight_transfer import engine\n"
        "from weight_transfer.authoring import Manifest\n"
    )
    assert [*foreign_imports(path)] == []


def test_every_name_resolves_and_nothing_else_does() -> None:
    names = vars(authoring)["__all__"]
    assert names and set(names) <= set(dir(authoring))
    for name in names:
        assert getattr(authoring, name) is not None
    with pytest.raises(AttributeError, match=r"'weight_transfer\.authoring' has no attribute 'Nothing'"):
        _ = authoring.Nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    stub = Path(authoring.__file__).with_suffix(".pyi").read_text()
    seen = {
        again: module
        for module, _, again in re.findall(r"^from weight_transfer\.(\S+) import (\w+) as (\w+)$", stub, re.M)
    }
    assert seen == vars(authoring)["_HOME"]


def test_the_names_of_a_plugin_module_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from weight_transfer.authoring import API_VERSION, Backend, Capability, Probe, hookimpl, to_bytes\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
