"""Regions go from every trainer rank straight to where each worker keeps them, between real processes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from support.region_engines import RegionFleet
from weight_transfer import PeerLostError, TransferTimeoutError

ADOPT: dict[str, Any] = {"backend": "ipc"}
STAGE: dict[str, Any] = {"backend": "ipc", "bucket_bytes": 1024, "options": {"export": "stage"}}
BOTH = pytest.mark.parametrize("config", [ADOPT, STAGE], ids=["adopted", "staged"])


@BOTH
@pytest.mark.parametrize(("ranks", "dim", "workers"), [(2, 0, 2), (3, 1, 1)])
def test_every_bit_arrives_when_weights_go_from_a_to_b_and_back(
    config: dict[str, Any], ranks: int, dim: int, workers: int
) -> None:
    with RegionFleet(ranks, workers, config, dim) as fleet:
        for seed in (1, 2, 1):
            received = fleet.update(seed)
            assert received == [worker.ask("planned") for worker in fleet.workers]
            assert all(worker.ask("holds", seed) for worker in fleet.workers)
            if seed == 2:
                for worker in fleet.workers:
                    worker.ask("move_targets")
        extra = [trainer.ask("release") for trainer in fleet.trainers]
        assert all(extra) if config is STAGE else not any(extra)
        for trainer in fleet.trainers:
            trainer.ask("shutdown")
        for worker in fleet.workers:
            assert _eventually_lost(worker)
            worker.ask("shutdown")


@BOTH
def test_a_rank_that_dies_ends_the_wait_for_another_and_is_named(config: dict[str, Any]) -> None:
    with RegionFleet(3, 1, config) as fleet:
        [worker] = fleet.workers
        shares = [trainer.ask("share", 1) for trainer in fleet.trainers]
        end = worker.begin("receive", shares)  # waits for rank 0, which sends nothing
        fleet.trainers[2].process.kill()
        with pytest.raises(PeerLostError) as lost:
            end()
        assert lost.value.peer == "trainer rank 2"
        assert _eventually_lost(worker)


@BOTH
def test_a_rank_that_hangs_is_a_timeout(config: dict[str, Any]) -> None:
    with RegionFleet(2, 1, config) as fleet:
        [worker] = fleet.workers
        shares = [trainer.ask("share", 1) for trainer in fleet.trainers]
        end = worker.begin("receive", shares, 0.5)
        fleet.trainers[0].ask("send") if config is ADOPT else None
        with pytest.raises(TransferTimeoutError) as late:
            end()
        assert late.value.peer == ("trainer rank 1" if config is ADOPT else "trainer rank 0")


def _eventually_lost(worker: Any) -> bool:
    deadline = time.monotonic() + 10
    while not worker.ask("lost"):
        if time.monotonic() > deadline:
            return False
    return True
