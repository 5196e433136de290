"""Regions over gloo: each rank sends straight to those who keep them, and nothing is written after an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from support.region_case import PARAMS, Boxes, Case, split, whole
from support.region_engines import RegionEngines
from weight_transfer import ManifestMismatchError, PeerLostError, TransferTimeoutError

if TYPE_CHECKING:
    from support.actors import Actor


def engines(held: Sequence[Boxes], kept: Sequence[Boxes], bucket_bytes: str = "8KiB", **given: Any) -> RegionEngines:
    config = {"backend": "nccl", "bucket_bytes": bucket_bytes, "options": {"direct_bytes": "2KiB"}}
    return RegionEngines(Case(params=PARAMS, held=held, kept=kept, **given), config)


LAYOUTS: dict[str, tuple[list[Boxes], list[Boxes]]] = {
    "rows to columns": (split(PARAMS, 2), split(PARAMS, 2, 1)),
    "columns to rows": (split(PARAMS, 2, 1), split(PARAMS, 2)),
    "rows to whole": (split(PARAMS, 2), whole(PARAMS, 2)),
    "four uneven and empty shards to three workers": (split(PARAMS, 4), split(PARAMS, 3, -1)),
    "replicas to columns": (whole(PARAMS, 2), split(PARAMS, 2, 1)),
    "one rank to columns": (whole(PARAMS, 1), split(PARAMS, 2, 1)),
    "one rank, one worker": (whole(PARAMS, 1), split(PARAMS, 2, 1)[:1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
def test_every_worker_holds_the_bits_of_its_regions_and_moves_nothing_else(layout: str, strided: bool) -> None:
    lies = dict.fromkeys(PARAMS, "turned") if strided else {}
    with engines(*LAYOUTS[layout], shards_lie=lies, targets_lie=lies) as cast:
        cast.join().to_and_fro()


@pytest.mark.parametrize("bucket", ["256", "1KiB", "1MiB"])
def test_buckets_of_any_size_will_do_and_bound_the_memory(bucket: str) -> None:
    with engines(*LAYOUTS["rows to columns"], bucket_bytes=bucket) as cast:
        cast.join().to_and_fro()
        most = {"256": 2 * 2 * 256, "1KiB": 2 * 1024, "1MiB": 2 * 2**20}[bucket]
        assert all(0 < held <= most for held in cast.memory())


def test_weights_are_cast_on_the_shard_while_they_are_packed() -> None:
    masters = {name: "float32" for name, (dtype, _) in PARAMS.items() if "float" in dtype}
    with engines(*LAYOUTS["rows to columns"], masters=masters) as cast:
        cast.join().to_and_fro()


def test_tensors_that_move_between_updates_are_looked_up_again() -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        for seed in (1, 2, 1):
            cast.update(seed)
            for actor in cast.ranks:
                actor.ask("move")
            for actor in cast.workers:
                actor.ask("replace")


def test_a_rank_that_gives_nothing_and_a_worker_that_keeps_nothing_take_part() -> None:
    held = [whole(PARAMS, 1)[0], {}]
    kept = [split(PARAMS, 2, 1)[0], {name: [] for name in PARAMS}]
    with engines(held, kept) as cast:
        cast.join().to_and_fro()


def test_what_all_workers_take_of_a_single_rank_is_sent_once() -> None:
    kept = split(PARAMS, 2, 1, dims={"embed": None})
    with engines(whole(PARAMS, 1), kept) as cast:
        cast.join().to_and_fro()
        assert cast.describe()["shares"][0]["broadcast"] == [0, 3]  # embed, and the scalar


@pytest.mark.parametrize("missing", ["trainer rank 1", "worker 1"])
def test_who_does_not_join_is_named_on_all_others(missing: str) -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        absent = cast.ranks[1] if missing == "trainer rank 1" else cast.workers[1]
        for actor in cast.begin_joining(timeout=1.5, without=[absent]):
            error = actor.error(within=20)
            assert isinstance(error, TransferTimeoutError)
            name = "rank 2" if missing == "worker 1" and actor in cast.workers else missing
            assert error.peer == name, str(error)


@pytest.mark.parametrize("role", ["ranks", "workers"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_member_that_is_killed_before_its_part_is_lost_to_all_others(role: str, index: int) -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        info = cast.describe()
        dead: Actor = getattr(cast, role)[index]
        others = [actor for actor in cast.all if actor is not dead]
        for actor in others:
            cast.begin(actor, info)
        dead.kill()
        for actor in others:
            assert isinstance(actor.error(within=20), PeerLostError)
        if role == "ranks":
            assert cast.unlike(1) == []


@pytest.mark.parametrize("role", ["ranks", "workers"])
def test_a_member_that_is_killed_in_the_middle_is_lost_to_all_others(role: str) -> None:
    with engines(*LAYOUTS["rows to columns"], bucket_bytes="1KiB") as cast:
        cast.join()
        held, other = cast.workers
        info = cast.describe()
        cast.begin(held, info, holds=True)
        for actor in (other, *cast.ranks):
            cast.begin(actor, info)
        assert held.reply() == "held"
        dead = cast.ranks[1] if role == "ranks" else held
        dead.kill()
        if dead is not held:
            held.tell("release")
        for actor in cast.all:
            if actor is not dead:
                assert isinstance(actor.error(within=20), PeerLostError)


def test_after_the_deadline_nothing_is_written() -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        cast.fill(2)
        info = cast.describe()
        for actor in [cast.ranks[0], *cast.workers]:
            cast.begin(actor, info, timeout=1)
        for actor in [cast.ranks[0], *cast.workers]:
            assert isinstance(actor.error(within=20), (TransferTimeoutError, PeerLostError))
        assert cast.unlike(1) == []


def test_an_abort_ends_a_running_update_on_all_sides() -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        info = cast.describe()
        for actor in [*cast.workers, cast.ranks[0]]:
            cast.begin(actor, info)
        cast.ranks[1].ask("call", method="abort_update")
        for actor in [*cast.workers, cast.ranks[0]]:
            assert isinstance(actor.error(within=20), PeerLostError)


def test_a_rank_that_planned_otherwise_is_named_before_the_first_byte() -> None:
    with engines(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        info = cast.describe()
        info["shares"][1]["plans"]["0"] = "0" * 32
        cast.begin(cast.workers[0], info, timeout=10)
        error = cast.workers[0].error(within=20)
        assert isinstance(error, ManifestMismatchError)
        assert "Trainer rank 1" in str(error)
        assert cast.workers[0].ask("unlike", seed=1) == []
