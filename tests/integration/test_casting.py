"""fp32 masters reach servers as bfloat16 with fp32 routers, between real processes, with the bits of ``tensor.to``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.mixed import MIXED, Mixed

if TYPE_CHECKING:
    from support.actors import Spawn

LIMITS: dict[str, Any] = {"timeout": 30, "init_timeout": 30, "bucket_bytes": "64KiB"}
IPC: dict[str, Any] = LIMITS | {"backend": "ipc"}
NCCL: dict[str, Any] = LIMITS | {"backend": "nccl", "nccl": {"direct_bytes": "24KiB"}}
RDMA: dict[str, Any] = LIMITS | {"backend": "rdma"}
CONFIGS = [IPC, IPC | {"bucket_bytes": 4099}, IPC | {"ipc": {"export": "stage"}}, NCCL, RDMA]
IDS = ["ipc", "ipc, odd buckets", "ipc, staged", "nccl", "rdma"]


def check(spawn: Spawn, config: dict[str, Any], devices: list[str], in_place: bool) -> None:
    """Send A, then B, then A again to a worker on each device but the first."""
    plain = {key: value for key, value in config.items() if key != "cast"}
    workers = [spawn("mixed_worker", config=plain, in_place=in_place, device=device) for device in devices[1:]]
    trainer = spawn("mixed_trainer", config=config, workers=[worker.hello for worker in workers], device=devices[0])
    seen = []
    for version, seed in enumerate((1, 2, 1)):
        sent = trainer.ask("send", seed=seed, version=version)
        assert [worker.ask("digest") for worker in workers] == [sent["digest"]] * len(workers)
        assert [worker.ask("version") for worker in workers] == [version] * len(workers)
        assert sent["nbytes"] == sum(tensor.nbytes for tensor in Mixed(torch.bfloat16).state_dict().values())
        seen.append(sent["digest"])
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_arrive_cast(spawn: Spawn, config: dict[str, Any], in_place: bool) -> None:
    check(spawn, config | {"cast": MIXED}, ["cpu"] * 3, in_place)


@pytest.mark.parametrize("config", [IPC, NCCL, RDMA], ids=["ipc", "nccl", "rdma"])
def test_digests_are_of_the_cast_bytes(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": MIXED, "verify": "wire"}, ["cpu"] * 2, in_place=True)


@pytest.mark.parametrize("config", [IPC, NCCL, RDMA], ids=["ipc", "nccl", "rdma"])
def test_workers_tell_their_dtypes_over_http(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": {"*": "receiver"}}, ["cpu"] * 3, in_place=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("verify", ["none", "wire"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_on_a_gpu_arrive_cast(spawn: Spawn, config: dict[str, Any], in_place: bool, verify: str) -> None:
    count = torch.cuda.device_count()
    if count < 2 and config["backend"] == "nccl":
        pytest.skip("needs two CUDA devices: NCCL wants one per process")
    devices = ["cuda:0", f"cuda:{min(1, count - 1)}"]
    check(spawn, config | {"cast": MIXED, "verify": verify}, devices, in_place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [IPC, RDMA], ids=["ipc", "rdma"])
def test_masters_arrive_cast_on_the_gpu_where_they_lie(spawn: Spawn, config: dict[str, Any]) -> None:
    check(spawn, config | {"cast": MIXED}, ["cuda:0", "cuda:0"], in_place=True)
