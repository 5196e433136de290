"""Regions over gloo: each rank sends straight to those who keep them, and nothing is written after an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from support.actors import Actor
from weight_transfer import ManifestMismatchError, PeerLostError, TransferTimeoutError
from weight_transfer.authoring import Region

Params = dict[str, tuple[str, tuple[int, ...]]]
Holdings = list[dict[str, list[tuple[Sequence[int], Sequence[int]]]]]

PARAMS: Params = {
    "embed": ("bfloat16", (301, 40)),
    "norm": ("float32", (40,)),
    "up": ("bfloat16", (7, 24, 64)),
    "scale": ("float32", ()),
    "down": ("float8_e4m3fn", (64, 129)),
    "phases": ("complex128", (9, 5)),
    "mask": ("bool", (33, 17)),
    "nothing": ("float32", (0, 4)),
}
OPTIONS = {"direct_bytes": "2KiB"}


def split(params: Params, dim: int, count: int) -> Holdings:
    """Cut each parameter along one of its dimensions; scalars are everybody's."""
    return [
        {
            name: [(region.offset, region.shape)]
            for name, (_, shape) in params.items()
            for region in [Region.split(shape, dim if len(shape) > 1 else 0, index, count) if shape else Region((), ())]
        }
        for index in range(count)
    ]


def whole(params: Params, count: int) -> Holdings:
    return [{name: [((0,) * len(shape), shape)] for name, (_, shape) in params.items()} for _ in range(count)]


class Cast:
    """Trainer ranks and workers, each a process."""

    def __init__(self, held: Holdings, kept: Holdings, params: Params = PARAMS, **spec: Any) -> None:
        given = {"config": config(**spec.pop("options", {})), "params": params, "held": held, "kept": kept, **spec}
        self.ranks = [Actor("region_engine", side="trainer", rank=r, **given) for r in range(len(held))]
        self.workers = [Actor("region_engine", side="worker", number=n, **given) for n in range(len(kept))]
        for actor in self.all:
            actor.ready()

    @property
    def all(self) -> list[Actor]:
        return [*self.ranks, *self.workers]

    def begin_joining(self, timeout: float = 30, without: Sequence[Actor] = ()) -> None:
        infos = self.ranks[0].ask("open")
        ranks = [actor.ask("open_rank", first=infos[0]) for actor in self.ranks[1:]]
        for actor in self.ranks:
            if actor not in without:
                actor.tell("join", timeout=timeout)
        for actor, first in zip(self.workers, infos, strict=True):
            if actor not in without:
                actor.tell("init", timeout=timeout, first=first, ranks=ranks)

    def join(self) -> None:
        self.begin_joining()
        for actor in self.all:
            actor.reply()

    def share(self) -> list[dict[str, Any]]:
        return [actor.ask("share") for actor in self.ranks]

    def update(self, seed: int, timeout: float = 30) -> None:
        """Send the weights of a seed, and check what every worker then holds."""
        for actor in self.ranks:
            actor.ask("fill", seed=seed)
        shares = self.share()
        for actor in self.workers:
            actor.tell("receive", timeout=timeout, shares=shares)
        for actor in self.ranks:
            actor.tell("send", timeout=timeout)
        sent = [actor.reply() for actor in self.ranks]
        moved = [actor.reply() for actor in self.workers]
        assert moved == [actor.ask("planned") for actor in self.workers]
        assert sum(sent) <= sum(map(sum, moved))
        assert all(actor.ask("holds_seed", seed=seed) for actor in self.workers)

    def to_and_fro(self) -> None:
        self.join()
        for seed in (1, 2, 1):
            self.update(seed)


def config(**settings: Any) -> dict[str, Any]:
    return {"backend": "nccl", "bucket_bytes": "8KiB", "options": OPTIONS, **settings}


@contextmanager
def playing(*args: Any, **spec: Any) -> Iterator[Cast]:
    cast = Cast(*args, **spec)
    try:
        yield cast
    finally:
        for actor in cast.all:
            actor.hang_up()
        for actor in cast.all:
            actor.stop()


LAYOUTS: dict[str, tuple[Holdings, Holdings]] = {
    "rows to columns": (split(PARAMS, 0, 2), split(PARAMS, 1, 2)),
    "columns to rows": (split(PARAMS, 1, 2), split(PARAMS, 0, 2)),
    "rows to whole": (split(PARAMS, 0, 2), whole(PARAMS, 2)),
    "four uneven and empty shards to three workers": (split(PARAMS, 0, 4), split(PARAMS, -1, 3)),
    "replicas to columns": (whole(PARAMS, 2), split(PARAMS, 1, 2)),
    "one rank to columns": (whole(PARAMS, 1), split(PARAMS, 1, 2)),
    "one rank, one worker": (whole(PARAMS, 1), split(PARAMS, 1, 2)[:1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
def test_every_worker_holds_the_bits_of_its_regions_and_moves_nothing_else(layout: str, strided: bool) -> None:
    with playing(*LAYOUTS[layout], strided=strided) as cast:
        cast.to_and_fro()


@pytest.mark.parametrize("bucket", ["256", "1KiB", "1MiB"])
def test_buckets_of_any_size_will_do_and_bound_the_memory(bucket: str) -> None:
    with playing(*LAYOUTS["rows to columns"], options={"bucket_bytes": bucket}) as cast:
        cast.to_and_fro()
        most = {"256": 2 * 2 * 256, "1KiB": 2 * 1024, "1MiB": 2 * 2**20}[bucket]
        assert all(0 < actor.ask("memory") <= most for actor in cast.all)


def test_weights_are_cast_on_the_shard_while_they_are_packed() -> None:
    with playing(*LAYOUTS["rows to columns"], masters="float32") as cast:
        cast.to_and_fro()


def test_tensors_that_move_between_updates_are_looked_up_again() -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        for seed in (1, 2, 1):
            cast.update(seed)
            for actor in cast.all:
                actor.ask("move")


def test_a_rank_that_gives_nothing_and_a_worker_that_keeps_nothing_take_part() -> None:
    held = [whole(PARAMS, 1)[0], {}]
    kept = [split(PARAMS, 1, 2)[0], {name: [] for name in PARAMS}]
    with playing(held, kept) as cast:
        cast.to_and_fro()


def test_what_all_workers_take_of_a_single_rank_is_sent_once() -> None:
    kept: Holdings = [{**own, "embed": whole(PARAMS, 1)[0]["embed"]} for own in split(PARAMS, 1, 2)]
    with playing(whole(PARAMS, 1), kept) as cast:
        cast.to_and_fro()
        assert cast.share()[0]["broadcast"] == [0, 3]  # embed, and the scalar


@pytest.mark.parametrize("missing", ["trainer rank 1", "worker 1"])
def test_who_does_not_join_is_named_on_all_others(missing: str) -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        absent = cast.ranks[1] if missing == "trainer rank 1" else cast.workers[1]
        cast.begin_joining(timeout=1.5, without=[absent])
        for actor in cast.all:
            if actor is not absent:
                error = actor.error(within=20)
                assert isinstance(error, TransferTimeoutError)
                name = "rank 2" if missing == "worker 1" and actor in cast.workers else missing
                assert error.peer == name, str(error)


@pytest.mark.parametrize("role", ["ranks", "workers"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_member_that_is_killed_before_its_part_is_lost_to_all_others(role: str, index: int) -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        shares = cast.share()
        dead: Actor = getattr(cast, role)[index]
        others = [actor for actor in cast.all if actor is not dead]
        for actor in others:
            begin(actor, cast, shares, timeout=30)
        dead.kill()
        for actor in others:
            assert isinstance(actor.error(within=20), PeerLostError)
        if role == "ranks":
            assert all(actor.ask("holds_seed", seed=1) for actor in cast.workers)


@pytest.mark.parametrize("role", ["ranks", "workers"])
def test_a_member_that_is_killed_in_the_middle_is_lost_to_all_others(role: str) -> None:
    with playing(*LAYOUTS["rows to columns"], options={"bucket_bytes": "1KiB"}) as cast:
        cast.join()
        held, other = cast.workers
        shares = cast.share()
        held.tell("receive", timeout=30, shares=shares, holds=True)
        begin(other, cast, shares, timeout=30)
        for actor in cast.ranks:
            begin(actor, cast, shares, timeout=30)
        assert held.reply() == "held"
        dead = cast.ranks[1] if role == "ranks" else held
        dead.kill()
        if dead is not held:
            held.tell("release")
        for actor in cast.all:
            if actor is not dead:
                assert isinstance(actor.error(within=20), PeerLostError)


def test_after_the_deadline_nothing_is_written() -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        cast.ranks[0].ask("fill", seed=2)
        cast.ranks[1].ask("fill", seed=2)
        shares = cast.share()
        for actor in [cast.ranks[0], *cast.workers]:
            begin(actor, cast, shares, timeout=1)
        for actor in [cast.ranks[0], *cast.workers]:
            assert isinstance(actor.error(within=20), (TransferTimeoutError, PeerLostError))
        assert all(actor.ask("holds_seed", seed=1) for actor in cast.workers)


def test_an_abort_ends_a_running_update_on_all_sides() -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        shares = cast.share()
        for actor in [*cast.workers, cast.ranks[0]]:
            begin(actor, cast, shares, timeout=30)
        cast.ranks[1].ask("abort")
        for actor in [*cast.workers, cast.ranks[0]]:
            assert isinstance(actor.error(within=20), PeerLostError)


def test_a_rank_that_planned_otherwise_is_named_before_the_first_byte() -> None:
    with playing(*LAYOUTS["rows to columns"]) as cast:
        cast.join()
        cast.update(1)
        shares = cast.share()
        shares[1]["plans"]["0"] = "0" * 32
        cast.workers[0].tell("receive", timeout=10, shares=shares)
        error = cast.workers[0].error(within=20)
        assert isinstance(error, ManifestMismatchError)
        assert "Trainer rank 1" in str(error)
        assert cast.workers[0].ask("holds_seed", seed=1)


def begin(actor: Actor, cast: Cast, shares: Sequence[Mapping[str, Any]], timeout: float) -> None:
    """Let an actor begin its part of an update."""
    if actor in cast.workers:
        actor.tell("receive", timeout=timeout, shares=shares)
    else:
        actor.tell("send", timeout=timeout)
