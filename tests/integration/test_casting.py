"""fp32 masters reach servers as bfloat16 with fp32 routers, between real processes, with the bits of ``tensor.to``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.mixed import MIXED, Mixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.actors import Spawn

LIMITS: dict[str, Any] = {"timeout": 30, "init_timeout": 30, "bucket_bytes": "64KiB"}
IPC: dict[str, Any] = LIMITS | {"backend": "ipc"}
NCCL: dict[str, Any] = LIMITS | {"backend": "nccl", "nccl": {"direct_bytes": "24KiB"}}
RDMA: dict[str, Any] = LIMITS | {"backend": "rdma"}
CONFIGS = [IPC, IPC | {"bucket_bytes": 4099}, IPC | {"ipc": {"export": "stage"}}, NCCL, RDMA]
IDS = ["ipc", "ipc, odd buckets", "ipc, staged", "nccl", "rdma"]


def check(spawn: Spawn, config: dict[str, Any], devices: list[str], in_place: Sequence[bool]) -> None:
    """Send A, then B, then A again to a worker on each device but the first, of which some are written ``in_place``."""
    plain = {key: value for key, value in config.items() if key != "cast"}
    workers = [
        spawn("mixed_worker", config=plain, in_place=written, device=device)
        for device, written in zip(devices[1:], in_place, strict=True)
    ]
    trainer = spawn("mixed_trainer", config=config, workers=[worker.hello for worker in workers], device=devices[0])
    seen = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * len(workers)
        assert [worker.ask("version") for worker in workers] == [version] * len(workers)
        assert sent["nbytes"] == sum(tensor.nbytes for tensor in Mixed(torch.bfloat16).state_dict().values())
        seen.append(sent["digest"])
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_arrive_cast_in_place_and_by_a_loader(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": MIXED}, ["cpu"] * 3, [True, False])


@pytest.mark.parametrize("config", [IPC, NCCL, RDMA], ids=["ipc", "nccl", "rdma"])
def test_digests_are_of_the_cast_bytes(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": MIXED, "verify": "wire"}, ["cpu"] * 2, [True])


@pytest.mark.parametrize("config", [IPC, NCCL, RDMA], ids=["ipc", "nccl", "rdma"])
def test_workers_tell_their_dtypes_over_http(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": {"*": "receiver"}}, ["cpu"] * 3, [True, True])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("verify", ["none", "wire"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_on_a_gpu_arrive_cast(spawn: Spawn, config: dict[str, Any], in_place: bool, verify: str) -> None:
    count = torch.cuda.device_count()
    if count < 2 and config["backend"] != "ipc":
        pytest.skip("needs two CUDA devices: NCCL wants one per process, and UCX offers only TCP on one")
    devices = ["cuda:0", f"cuda:{min(1, count - 1)}"]
    check(spawn, config | {"cast": MIXED, "verify": verify}, devices, [in_place])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [IPC, RDMA], ids=["ipc", "rdma"])
def test_masters_arrive_cast_on_the_gpu_where_they_lie(spawn: Spawn, config: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2 and config["backend"] == "rdma":
        pytest.skip("needs two CUDA devices: where there is one, UCX offers only TCP")
    check(spawn, config | {"cast": MIXED}, ["cuda:0", "cuda:0"], [True])
