"""What the machine is said to have and to lack, on machines that are made up."""

from __future__ import annotations

import resource
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from weight_transfer.machine import checks
from weight_transfer.machine.nvml import Gpus, find_gpus
from weight_transfer.plugins.backend import Verdict


@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        (Gpus(missing="no NVIDIA driver"), "no NVIDIA driver"),
        (Gpus(indices=[0]), "1 GPU"),
        (Gpus(indices=[0, 1]), "2 GPUs, each can read the others' memory"),
        (Gpus(indices=[0], sliced=[0]), "1 GPU; GPU 0 is cut into slices (MIG), which share no memory with each other"),
        (Gpus(indices=[0, 1], apart=[(0, 1)]), "2 GPUs; GPU 0 cannot read GPU 1's memory"),
    ],
)
def test_gpus_are_described(gpus: Gpus, text: str) -> None:
    assert str(gpus) == text


def test_gpus_are_found_as_far_as_there_are_any() -> None:
    gpus = find_gpus()
    assert bool(gpus.indices) is not bool(gpus.missing)
    assert (gpus.cuda is None) or gpus.cuda[0] > 9


@pytest.mark.parametrize(
    ("gpus", "verdict", "fix"),
    [
        (Gpus(indices=[0, 1]), Verdict.OK, ""),
        (Gpus(missing="no GPU"), Verdict.LIMITED, ""),
        (Gpus(indices=[0, 1], sliced=[1]), Verdict.LIMITED, "nvidia-smi -i 1 -mig 0"),
        (Gpus(indices=[0, 1], apart=[(0, 1)]), Verdict.LIMITED, "nvidia-smi topo -p2p r"),
    ],
)
def test_gpus_that_cannot_reach_each_other_are_told_with_a_command(
    monkeypatch: pytest.MonkeyPatch, gpus: Gpus, verdict: Verdict, fix: str
) -> None:
    monkeypatch.setattr(checks, "find_gpus", lambda: gpus)
    check = checks.check_gpus()
    assert check.verdict is verdict
    assert fix in check.fix and bool(fix) is bool(check.fix)


@pytest.mark.parametrize(
    ("built", "driver", "verdict"),
    [
        (None, None, Verdict.OK),
        (None, (12, 4), Verdict.LIMITED),
        ("12.8", (12, 4), Verdict.OK),
        ("13.0", (12, 4), Verdict.BROKEN),
    ],
)
def test_a_torch_that_does_not_suit_the_driver_is_told(
    monkeypatch: pytest.MonkeyPatch, built: str | None, driver: tuple[int, int] | None, verdict: Verdict
) -> None:
    monkeypatch.setattr(checks, "find_gpus", lambda: Gpus(indices=[0] if driver else [], cuda=driver))
    monkeypatch.setattr(torch.version, "cuda", built)
    check = checks.check_torch()
    assert check.verdict is verdict
    assert ("CUDA 12" in check.fix) is (verdict is not Verdict.OK)


@pytest.mark.parametrize(("free", "verdict"), [(64 * 2**20, Verdict.LIMITED), (8 * 2**30, Verdict.OK)])
def test_small_shared_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, verdict: Verdict
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(free, 0, free))
    check = checks.check_shared_memory(tmp_path)
    assert check.verdict is verdict
    assert ("--shm-size" in check.fix) is (verdict is Verdict.LIMITED)
    assert checks.check_shared_memory(tmp_path / "none").verdict is Verdict.LIMITED


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A machine with one RDMA port: the kernel's folder of devices."""
    port = tmp_path / "infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE"), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
        (port / name).write_text(f"{text}\n")
    return tmp_path / "infiniband"


def test_rdma_ports_are_told_with_their_rate(device: Path, tmp_path: Path) -> None:
    assert checks.check_rdma_devices(tmp_path / "none").verdict is Verdict.LIMITED
    hidden = checks.check_rdma_devices(device, tmp_path / "none")
    assert hidden.verdict is Verdict.LIMITED and "--device" in hidden.fix
    check = checks.check_rdma_devices(device, tmp_path)
    assert (check.verdict, check.found) == (Verdict.OK, "mlx5_0:1 active, 400 Gb/sec (4X NDR), InfiniBand")
    (device / "mlx5_0/ports/1/state").write_text("1: DOWN\n")
    down = checks.check_rdma_devices(device, tmp_path)
    assert down.verdict is Verdict.LIMITED and "mlx5_0:1 down" in down.found and down.fix


@pytest.mark.parametrize(
    ("limit", "verdict"), [(8 * 2**20, Verdict.BROKEN), (2**40, Verdict.OK), (resource.RLIM_INFINITY, Verdict.OK)]
)
def test_little_locked_memory_matters_where_there_are_rdma_devices(
    monkeypatch: pytest.MonkeyPatch, device: Path, tmp_path: Path, limit: int, verdict: Verdict
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    check = checks.check_locked_memory(device)
    assert check.verdict is verdict
    assert ("ulimit -l unlimited" in check.fix) is (verdict is Verdict.BROKEN)
    assert checks.check_locked_memory(tmp_path / "none").verdict is Verdict.OK


@pytest.mark.parametrize(
    ("scope", "capabilities", "verdict"),
    [("0", "0", Verdict.OK), ("1", "0", Verdict.LIMITED), ("1", "0000000000080000", Verdict.OK)],
)
def test_processes_that_may_not_read_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str, capabilities: str, verdict: Verdict
) -> None:
    (tmp_path / "sys/kernel/yama").mkdir(parents=True)
    (tmp_path / "sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(checks, "_refusal_to_read", str)
    assert checks.check_process_memory(tmp_path).verdict is verdict
    monkeypatch.setattr(checks, "_refusal_to_read", lambda: "Operation not permitted")
    assert "SYS_PTRACE" in checks.check_process_memory(tmp_path).fix
