"""What a type checker says of a configuration made by hand: it takes what the pages show, and nothing misspelt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="mypy is not installed")

ROOT = Path(__file__).parents[2]
GOOD = """
from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer_ipc.config import IpcOptions
from weight_transfer_nccl.config import NcclOptions

WeightTransferConfig(backend="ipc", bucket_bytes="1GiB", timeout=120, observers=["progress"])
WeightTransferConfig(backend="ipc", bucket_bytes=2**20, on_worker_failure="continue", options=IpcOptions())
NcclOptions(direct_bytes="4MiB")
ParallelConfig(rank=1, world_size=2, device="cuda:1")
"""
UNREAD = """
[mypy]
[mypy-cattrs.*,httpx.*,pluggy.*,rich.*,starlette.*,torch.*,uvicorn.*]
follow_imports = skip
[mypy-weight_transfer.*,weight_transfer_ipc.*,weight_transfer_nccl.*]
follow_imports = silent
"""  # reading torch alone takes twenty seconds
WRONG = {
    'WeightTransferConfig(backend="ipc", bucket_byte="1GiB")': 'Unexpected keyword argument "bucket_byte"',
    'WeightTransferConfig(backend="ipc", bucket_bytes=1.5)': 'Argument "bucket_bytes"',
    'WeightTransferConfig(backend="ipc", timeout="2 min")': 'Argument "timeout"',
    'WeightTransferConfig(backend="ipc", on_worker_failure="contine")': 'Argument "on_worker_failure"',
    "WeightTransferConfig(timeout=3)": 'Missing named argument "backend"',
    'NcclOptions(direct_byte="4MiB")': 'Unexpected keyword argument "direct_byte"',
    "NcclOptions(direct_bytes=None)": 'Argument "direct_bytes"',
    "ParallelConfig(world=2)": 'Unexpected keyword argument "world"',
}


def test_what_the_pages_show_is_accepted_and_what_is_misspelt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "user.py"
    file.write_text(GOOD + "\n".join(WRONG))
    (tmp_path / "mypy.ini").write_text(UNREAD)
    monkeypatch.setenv("MYPYPATH", ":".join(str(ROOT / path) for path in ("core", "plugins/ipc", "plugins/nccl")))
    options = [
        "--strict",
        f"--config-file={tmp_path}/mypy.ini",
        f"--cache-dir={tmp_path}/cache",
        "--hide-error-context",
    ]
    text, errors, _ = api.run([*options, str(file)])
    assert errors == ""
    told: dict[int, str] = {}
    for line in text.splitlines():
        if found := re.match(r".*user\.py:(\d+): error: (.*)", line):
            told[int(found[1])] = found[2]
    first = GOOD.count("\n") + 1
    assert set(told) == set(range(first, first + len(WRONG))), text
    for number, words in enumerate(WRONG.values(), first):
        assert told[number].startswith(words)
