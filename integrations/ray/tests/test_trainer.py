"""A trainer of several ranks on a cluster: each sends its own part, and a rank that fails is named."""

from __future__ import annotations

from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs Ray; `make test-ray` installs it")

from actors import COLUMNS, ROWS, Keeper, Trainer, make_weight  # noqa: E402  (they need Ray)

import weight_transfer as wt  # noqa: E402
from weight_transfer_ray import TrainerGroup  # noqa: E402


def halves(seed: int) -> list[bytes]:
    raw = make_weight(seed).numpy().tobytes()
    return [raw[: len(raw) // 2], raw[len(raw) // 2 :]]


@pytest.mark.parametrize("backend", ["ipc", "nccl", "rdma"])
def test_two_ranks_send_regions_to_two_actors(backend: str, nodes: Any, place: Any) -> None:
    config = {"backend": backend, "timeout": 30, "init_timeout": 60}
    workers = [place(Keeper, node, config, number) for number, node in enumerate(["n1", "head"])]
    with TrainerGroup(Trainer, 2, arguments=(config, workers), strategy="STRICT_SPREAD") as trainer:
        assert len(set(trainer.nodes)) == 2
        assert trainer.each("gather", timeout=60) == [1, 1]
        for seed in (1, 2, 1):
            trainer.each("take", seed, timeout=30)
            given = trainer.each("send", timeout=60)
            assert given == [(ROWS * COLUMNS * 2, ROWS * COLUMNS * 2)] * 2
            assert ray.get([worker.raw.remote() for worker in workers], timeout=30) == halves(seed)
        with pytest.raises(ValueError, match="this rank fails"):
            trainer.each("fail", 1, timeout=30)
        with pytest.raises(wt.PeerLostError, match="has died") as caught:
            trainer.each("end", 1, timeout=30)
        assert caught.value.peer == "trainer rank 1"


def test_a_cluster_without_room_is_told(nodes: Any) -> None:
    with pytest.raises(wt.TransferTimeoutError, match="2 bundles of"):
        TrainerGroup(Trainer, 2, bundle={"no such thing": 1}, timeout=1)
