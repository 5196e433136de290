"""The loaders of vLLM's own classes on two tensor-parallel ranks, recorded, and replayed bit for bit.

Runs where vLLM is installed. No model runs, so that none needs kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("transformers")

from architectures import ARCHITECTURES

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both ranks found, by architecture."""
    root = tmp_path_factory.mktemp("models")
    for name, architecture in ARCHITECTURES.items():
        architecture.save(root / name)
    script = Path(__file__).with_name("recording_rank.py")
    shared = {"VLLM_DIST_IDENT": uuid.uuid4().hex[:8], "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), root],
            env={**os.environ, **shared},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    files = [root / f"rank-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), "\n".join(said)
    answers = [json.loads(file.read_text()) for file in files]
    return {name: [answer[name] for answer in answers] for name in ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loader_is_recorded_and_replayed_bit_for_bit(found: Found, name: str) -> None:
    computed = ARCHITECTURES[name].computed
    for rank in found[name]:
        assert "error" not in rank, rank["error"]
        assert not rank["touched"] and not rank["failed"] and not rank["uncovered"]
        assert rank["unequal"] == sorted(rank["refused"])
        assert all(computed is not None and key.endswith(computed) for key in rank["refused"]), rank["refused"]
        assert len(set(rank["digests"])) == 1 and rank["dims"] <= 3
        assert 0.4 < rank["kept"] < 0.56
        computed_from = {source for sources, _ in rank["refused"].values() for source in sources}
        assert set(rank["whole"]) == computed_from.union(rank["cast"])
    assert found[name][0]["digests"] != found[name][1]["digests"]


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.computed])
def test_what_is_computed_is_refused_with_its_source(found: Found, name: str) -> None:
    for rank in found[name]:
        for key, (sources, reason) in rank["refused"].items():
            assert sources == [f"{key}_log"] and reason == f"aten.exp computes with '{key}_log'"
        assert len(rank["refused"]) == 2 and rank["parameters"] > 20


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.expert_parallel])
def test_of_experts_each_rank_needs_its_own(found: Found, name: str) -> None:
    first, second = (set(rank["unused"]) for rank in found[name])
    assert first and len(first) == len(second) and not first & second
    assert all(".experts." in source for source in first | second)


def test_table(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{'model':18} {'sources':>7} {'copies':>7} {'dims':>4} {'kept':>11} {'refused':>7} {'ms':>9}"]
    for name, (one, two) in found.items():
        kept, took = f"{one['kept']:.3f} {two['kept']:.3f}", f"{one['seconds'] * 1e3:.0f} {two['seconds'] * 1e3:.0f}"
        counts = f"{one['sources']:7} {one['copies']:7} {one['dims']:4}"
        rows.append(f"{name:18} {counts} {kept:>11} {len(one['refused']):7} {took:>9}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    assert len(rows) == 1 + len(ARCHITECTURES)
