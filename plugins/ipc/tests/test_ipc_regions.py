"""Regions go from every trainer rank straight to where each worker keeps them, between real processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.region_case import mixed
from support.region_engines import RegionEngines
from weight_transfer import PeerLostError, TransferTimeoutError
from weight_transfer.testing.actors import eventually

if TYPE_CHECKING:
    from support.actors import Actor

ADOPT: dict[str, Any] = {"backend": "ipc"}
STAGE: dict[str, Any] = {"backend": "ipc", "bucket_bytes": 1024, "options": {"export": "stage"}}
BOTH = pytest.mark.parametrize("config", [ADOPT, STAGE], ids=["adopted", "staged"])


@BOTH
@pytest.mark.parametrize(("ranks", "dim", "workers"), [(2, 0, 2), (3, 1, 1)])
def test_every_bit_arrives_when_weights_go_from_a_to_b_and_back(
    config: dict[str, Any], ranks: int, dim: int, workers: int
) -> None:
    with RegionEngines(mixed(ranks, workers, dim), config) as engines:
        engines.join()
        for seed in (1, 2, 1):
            engines.update(seed)
            if seed == 2:
                for worker in engines.workers:
                    worker.ask("replace")
        extra = engines.memory()[:ranks]
        assert all(extra) if config is STAGE else not any(extra)
        for trainer in engines.ranks:
            trainer.ask("call", method="shutdown")
        for worker in engines.workers:
            assert _eventually_lost(worker)
            worker.ask("call", method="shutdown")


@BOTH
def test_a_rank_that_dies_ends_the_wait_for_another_and_is_named(config: dict[str, Any]) -> None:
    with RegionEngines(mixed(3, 1), config) as engines:
        engines.join()
        [worker] = engines.workers
        engines.begin(worker, engines.describe())  # waits for rank 0, which sends nothing
        engines.ranks[2].kill()
        error = worker.error()
        assert isinstance(error, PeerLostError)
        assert error.peer == "trainer rank 2"
        assert _eventually_lost(worker)


@BOTH
def test_a_rank_that_hangs_is_a_timeout(config: dict[str, Any]) -> None:
    with RegionEngines(mixed(2, 1), config) as engines:
        engines.join()
        [worker] = engines.workers
        info = engines.describe()
        engines.begin(worker, info, timeout=1)
        if config is ADOPT:
            engines.begin(engines.ranks[0], info)
            engines.ranks[0].reply()
        error = worker.error()
        assert isinstance(error, TransferTimeoutError)
        assert error.peer == ("trainer rank 1" if config is ADOPT else "trainer rank 0")


def _eventually_lost(worker: Actor) -> bool:
    return eventually(lambda: worker.ask("get", name="lost"), 10)
