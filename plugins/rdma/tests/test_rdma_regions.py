"""Updates by region: real trainer ranks and workers, layouts of both kinds, bits after A, B, A, and how they fail."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import pytest

from support.region_case import Case, Params, split
from support.region_engines import RegionEngines
from weight_transfer import PeerLostError, TransferError, TransferTimeoutError, WeightTransferError

COLUMNS = ("down", "conv")


def params(scale: int = 1) -> Params:
    return {
        "embed": ("bfloat16", (1001 * scale, 256)),
        "up": ("bfloat16", (512, 512)),
        "down": ("bfloat16", (512, 1024 * scale)),
        "norm": ("float32", (300,)),
        "scale": ("float32", ()),
        "conv": ("float16", (8, 6, 5, 4)),
    }


def case(ranks: int = 2, workers: int = 2, scale: int = 1, **given: Any) -> Case:
    """Ranks hold rows of everything; workers keep columns of two weights, and rows of the others."""
    own = params(scale)
    kept = split(own, workers, dims=dict.fromkeys(COLUMNS, 1))
    return Case(params=own, held=split(own, ranks), kept=kept, **given)


def engines(given: Case, options: dict[str, Any] | None = None, **config: Any) -> RegionEngines:
    return RegionEngines(given, {"backend": "rdma", "options": options or {}, **config})


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "rows to columns": (case(), {}),
    "three ranks, uneven, of which some are empty, to two workers": (case(ranks=3), {}),
    "two ranks to three workers": (case(workers=3), {}),
    "one rank to two workers": (case(ranks=1), {}),
    "nothing is moved into shared memory": (case(), {"options": {"adopt": False}}),
    "fp32 masters are converted": (case(masters={"embed": "float32", "down": "float32"}), {}),
    "strided targets and shards, a storage in use": (
        case(shards_lie={"embed": "spread"}, targets_lie={"up": "spread", "conv": "spread"}, lent=["down"]),
        {},
    ),
    "over TCP": (case(), {"options": {"transport": "tcp"}}),
    "more buckets than a ring has": (
        case(masters={"embed": "float32", "down": "float64"}, scale=8),
        {"bucket_bytes": 2**20, "buckets": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_worker_gets_the_bits_that_it_keeps(name: str) -> None:
    given, config = CASES[name]
    with engines(given, **config) as joined:
        joined.join().to_and_fro()


def test_only_what_is_cut_fine_is_packed() -> None:
    given = case()
    with engines(given) as joined:
        packed = sum(joined.join().update(1))
        assert packed == sum(param.nbytes for param in given.manifest.params if param.name in COLUMNS)
        *rings, first, second = joined.memory()
        assert 0 < max(rings) <= 2 * packed
        assert [first, second] == [0, 0], "what is packed is read where it belongs"


def test_shards_and_targets_that_have_moved_are_found() -> None:
    with engines(case()) as joined:
        joined.join()
        for seed, name in ((1, "up"), (2, "down"), (1, "embed")):
            joined.update(seed)
            joined.ranks[1].ask("move", names=[name])
            joined.workers[0].ask("move", target=seed)


def test_more_staging_memory_does_not_void_the_plan_for_which_it_is() -> None:
    """Columns are packed, so there are counters; then large targets are not contiguous any more."""
    with engines(case(targets_lie={"conv": "spread"})) as joined:
        joined.join().update(1)
        before = joined.memory()[2:]
        for actor in joined.workers:
            actor.ask("move", target=0, lies="spread")
        for seed in (2, 1):
            joined.update(seed)
            assert all(now > was > 0 for now, was in zip(joined.memory()[2:], before, strict=True))


def test_a_fork_parts_nobody_from_what_is_sent() -> None:
    with engines(case()) as joined:
        once = joined.join().update(1)
        for actors, seed in ((joined.ranks, 2), (joined.workers, 1)):
            for actor in actors:
                actor.ask("fork")
            assert joined.update(seed) == once
        assert joined.memory()[2:] == [0, 0], "the targets were adopted anew"


def test_a_worker_can_join_again_while_the_other_one_stays() -> None:
    with engines(case()) as joined:
        joined.join().update(1)
        joined.workers[1].stop()
        for rank in joined.ranks:
            rank.ask("call", method="lose_worker", arguments=["worker 1"])
        joined.restart(1)
        joined.join([1])
        for seed in (2, 1):
            joined.update(seed)


@pytest.mark.parametrize("stands_still", [False, True], ids=["dies", "stops"])
def test_a_rank_that_dies_or_stops_is_named_and_nothing_is_written_afterwards(stands_still: bool) -> None:
    """The rank has packed nothing, so its workers wait for it."""
    with engines(case(ranks=3)) as joined, ExitStack() as until_the_end:
        joined.join().update(1)
        info = joined.describe()
        *others, last = joined.ranks
        until_the_end.enter_context(last.stopped()) if stands_still else last.kill()
        for actor in (*joined.workers, *others):
            joined.begin(actor, info, timeout=4)
        for worker in joined.workers:
            error = worker.error()
            assert type(error) is (TransferTimeoutError if stands_still else PeerLostError)
            assert error.peer == "trainer rank 2"
        before = [worker.ask("digests") for worker in joined.workers]
        for rank in others:
            with suppress(WeightTransferError):  # the workers may have given up before they read its buckets
                rank.reply()
            rank.ask("fill", seed=7)
        assert [worker.ask("digests") for worker in joined.workers] == before


def test_an_abort_ends_both_sides_and_a_new_group_can_send() -> None:
    with engines(case()) as joined:
        joined.join().update(1)
        info = joined.describe()
        for actor in (joined.workers[0], joined.ranks[0]):
            joined.begin(actor, info)
            joined.abort_from_another_thread(actor)
            error = actor.error()
            assert type(error) in (TransferError, PeerLostError) and "unexpectedly" not in str(error)
        for rank in joined.ranks:
            rank.ask("call", method="abort_update")
        for number in (0, 1):
            joined.restart(number)
        joined.join()
        for seed in (2, 1):
            joined.update(seed)


def test_a_trainer_rank_gives_up_at_its_deadline() -> None:
    with engines(case()) as joined:
        joined.join()
        joined.begin(joined.ranks[0], joined.describe(), timeout=0.2)
        assert isinstance(joined.ranks[0].error(), TransferTimeoutError)


def test_shares_that_do_not_fit_the_layout_are_refused() -> None:
    with engines(case()) as joined:
        info = joined.join().describe()
        info["shares"][1]["addresses"].pop()
        joined.begin(joined.workers[0], info)
        assert "trainer rank 1" in str(joined.workers[0].error())
        del info["shares"][1]
        joined.begin(joined.workers[1], info)
        assert "2 trainer ranks, of which 1" in str(joined.workers[1].error())
