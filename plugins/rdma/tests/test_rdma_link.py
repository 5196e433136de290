"""What is said of the link between trainer and worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_transfer_rdma.link import doubt_about, link_rate, slow_link
from weight_transfer_rdma.nixl import Transport

SHM = Transport("shm", "zero-copy over cma/memory")


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """The kernel's files about two ports of InfiniBand, an Ethernet card, and a loopback without a speed."""
    files = {
        "infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        "infiniband/mlx5_1/ports/2/rate": "200 Gb/sec (4X HDR)",
        "infiniband/down/ports/1/rate": "",
        "net/eth0/speed": "25000",
        "net/veth/speed": "-1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "rate"),
    [
        ("zero-copy over rc_mlx5/mlx5_0:1", 50.0),
        ("zero-copy over 60% on rc_mlx5/mlx5_0:1 and 40% on rc_mlx5/mlx5_1:2", 75.0),
        ("zero-copy over 50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_0:1/path1", 50.0),
        ("fragmented copy-in copy-out over tcp/eth0", 3.125),
        ("fragmented copy-in copy-out over tcp/lo", None),
        ("over tcp/veth", None),
        ("over rc_verbs/down:1", None),
        ("zero-copy over cma/memory", None),
        ("zero-copy over cuda_ipc/cuda", None),
        ("UCX did not report it", None),
    ],
)
def test_the_kernel_tells_the_rate_of_the_devices_that_ucx_names(devices: Path, path: str, rate: float | None) -> None:
    assert link_rate(Transport("any", path), devices) == rate


@pytest.mark.parametrize(
    ("nbytes", "seconds", "rate", "workers", "slow"),
    [
        (10**9, 0.041, 50.0, 1, True),
        (10**9, 0.039, 50.0, 1, False),
        (10**9, 0.041, 50.0, 2, False),
        (10**9, 0.081, 50.0, 2, True),
        (10**9, 9.9, None, 1, False),
        (10**6, 9.9, 50.0, 1, False),
        (10**9, 0.0, 50.0, 1, False),
    ],
)
def test_less_than_half_of_a_workers_share_is_slow(
    nbytes: int, seconds: float, rate: float | None, workers: int, slow: bool
) -> None:
    assert bool(slow_link(nbytes, seconds, SHM, rate, workers)) is slow


def test_the_sentence_names_what_was_measured_and_what_was_expected() -> None:
    sentence = slow_link(10**9, 0.5, SHM, 50.0, 2)
    assert sentence is not None
    assert "1.00 GB at 2.00 GB/s by zero-copy over cma/memory" in sentence
    assert "(50.00 GB/s for 2 workers)" in sentence


@pytest.mark.parametrize(
    ("transport", "words"),
    [
        (Transport("tcp", "copy over tcp/lo"), 'set transport = "tcp"'),
        (Transport("unknown", "over something/new"), "(over something/new)"),
    ],
)
def test_a_transport_that_nobody_asked_for_is_doubted(transport: Transport, words: str) -> None:
    assert words in (doubt_about(transport) or "")
    assert doubt_about(SHM) is None
