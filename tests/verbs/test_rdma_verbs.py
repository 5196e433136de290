"""The rdma backend's agents over real verbs: Soft-RoCE in a virtual machine, as ``make test-verbs`` prepares it.

The machine sees this one's files read-only and runs ``guest.py``; it boots in about ten seconds and is slow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

LAB = os.environ.get("RDMA_LAB")
FOLDER = Path(__file__).parent

pytestmark = [
    pytest.mark.verbs,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(LAB is None, reason="needs the virtual machine: make test-verbs"),
]


@pytest.mark.parametrize("case", ["bits", "killed", "stopped"])
def test_over_real_verbs(case: str, tmp_path: Path) -> None:
    """Bits arrive; a dead owner is an error long before UCX's 50 s; after a timeout nothing is written any more."""
    (library,) = [
        Path(str(file.locate()))
        for file in distribution("nixl-cu12").files or ()
        if file.name.startswith("libibverbs-") and ".so" in file.name
    ]
    (tmp_path / "libibverbs.so.1").symlink_to(library)  # UCX looks for it under this name
    command = f"export LD_LIBRARY_PATH={tmp_path}; {sys.executable} -B {FOLDER / 'guest.py'} {case}"
    done = subprocess.run(
        ["bash", str(FOLDER / "rdma-lab"), "run", str(LAB), command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"VERBS {case}" in done.stdout
    assert "rc_verbs" in done.stdout
