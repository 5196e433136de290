"""What is imported when: proven in fresh processes."""

from __future__ import annotations

import subprocess
import sys


def _modules(code: str) -> set[str]:
    """Run ``code`` in a new process and return the modules that it imported."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_metadata_nor_any_plugin() -> None:
    timed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import weight_transfer"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = {line.rpartition("|")[2].strip() for line in timed.stderr.splitlines()}
    bare = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True, timeout=60
    )
    added = names - {line.rpartition("|")[2].strip() for line in bare.stderr.splitlines()}
    assert "weight_transfer" in added
    unwanted = (
        "torch",
        "pluggy",
        "attr",
        "click",
        "rich",
        "importlib.metadata",
        "importlib_metadata",
        "weight_transfer_",
    )
    assert not [name for name in added if name.startswith(unwanted)]


def test_listing_backends_imports_no_plugin_and_no_torch() -> None:
    modules = _modules(
        "import weight_transfer as wt; assert {r.name for r in wt.backends()} >= {'ipc', 'loopback', 'nccl', 'rdma'}"
    )
    assert not [name for name in modules if name.startswith(("torch", "weight_transfer_"))]


def test_loading_one_backend_imports_no_other_plugin_and_no_torch() -> None:
    modules = _modules("import weight_transfer as wt; wt.load_backend('ipc')")
    plugins = {name.partition(".")[0] for name in modules if name.startswith("weight_transfer_")}
    assert plugins == {"weight_transfer_ipc"}
    assert "torch" not in modules


def test_reading_a_config_imports_no_torch() -> None:
    assert "torch" not in _modules(
        "import weight_transfer as wt; wt.load_config({'backend': 'ipc', 'ipc': {'export': 'stage'}})"
    )
