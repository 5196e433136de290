"""Updates by region: real trainer ranks and workers, layouts of both kinds, bits after A, B, A, and how they fail."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the actors' processes import it, too

from region_actors import Boxes, Case, EngineError, Group

from weight_transfer.model.regions import Region

COLUMNS = ("down", "conv")


def params(scale: int = 1) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "embed": ("bfloat16", (1001 * scale, 256)),
        "up": ("bfloat16", (512, 512)),
        "down": ("bfloat16", (512, 1024 * scale)),
        "norm": ("float32", (300,)),
        "scale": ("float32", ()),
        "conv": ("float16", (8, 6, 5, 4)),
    }


def split(params: dict[str, tuple[str, tuple[int, ...]]], dims: dict[str, int], index: int, count: int) -> Boxes:
    """Cut weights into ``count`` parts along a dimension each, by default the first; those without one stay whole."""
    boxes = {}
    for name, (_, shape) in params.items():
        region = Region.split(shape, dims.get(name, 0), index, count) if shape else Region.whole(shape)
        boxes[name] = [(region.offset, region.shape)]
    return boxes


def case(ranks: int = 2, workers: int = 2, scale: int = 1, **given: object) -> Case:
    """Ranks hold rows of everything; workers keep columns of two weights, and rows of the others."""
    own = params(scale)
    held = [split(own, {}, rank, ranks) for rank in range(ranks)]
    kept = [split(own, dict.fromkeys(COLUMNS, 1), worker, workers) for worker in range(workers)]
    return Case(params=own, held=held, kept=kept, **given)  # type: ignore[arg-type]


@pytest.fixture
def group() -> Iterator[Callable[[Case], Group]]:
    groups: list[Group] = []

    def make(given: Case) -> Group:
        groups.append(Group(given))
        return groups[-1]

    yield make
    for each in groups:
        each.close()


CASES = {
    "rows to columns": case(),
    "three ranks, uneven, of which some are empty, to two workers": case(ranks=3),
    "two ranks to three workers": case(workers=3),
    "one rank to two workers": case(ranks=1),
    "nothing is moved into shared memory": case(options={"adopt": False}),
    "fp32 masters are converted": case(masters={"embed": "float32", "down": "float32"}),
    "strided targets and shards, a storage in use": case(
        strided={"up": "target", "embed": "shard", "conv": "target"}, lent=frozenset({"down"})
    ),
    "over TCP": case(options={"transport": "tcp"}),
    "more buckets than a ring has": case(
        masters={"embed": "float32", "down": "float64"}, config={"bucket_bytes": 2**20, "buckets": 2}, scale=8
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_worker_gets_the_bits_that_it_keeps(name: str, group: Callable[[Case], Group]) -> None:
    given = CASES[name]
    joined = group(given)
    for seed in (1, 2, 1):
        _, got = joined.update(seed)
        assert joined.wrong(seed) == []
        for own, boxes in zip(got, given.kept, strict=True):
            assert sum(own.values()) == given.regions(boxes).nbytes


def test_only_what_is_cut_fine_is_packed(group: Callable[[Case], Group]) -> None:
    given = case()
    joined = group(given)
    packed, _ = joined.update(1)
    assert sum(packed) == sum(param.nbytes for param in given.manifest.params if param.name in COLUMNS)
    ring = max(actor("memory") for actor in joined.ranks)
    assert 0 < ring <= 2 * sum(packed)
    assert [actor("memory") for actor in joined.workers] == [0, 0], "what is packed is read where it belongs"


def test_shards_and_targets_that_have_moved_are_found(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    for seed, name in ((1, "up"), (2, "down"), (1, "embed")):
        joined.update(seed)
        assert joined.wrong(seed) == []
        joined.ranks[1]("reallocate", name)
        joined.workers[0]("replace", seed)


def test_more_staging_memory_does_not_void_the_plan_for_which_it_is(group: Callable[[Case], Group]) -> None:
    """Columns are packed, so there are counters; then large targets are not contiguous any more."""
    joined = group(case(strided={"conv": "target"}))
    joined.update(1)
    before = [actor("memory") for actor in joined.workers]
    for actor in joined.workers:
        actor("stride", 0)
    for seed in (2, 1):
        joined.update(seed)
        assert joined.wrong(seed) == []
        assert all(actor("memory") > held > 0 for actor, held in zip(joined.workers, before, strict=True))


def test_a_fork_parts_nobody_from_what_is_sent(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    once, _ = joined.update(1)
    for actors, seed in ((joined.ranks, 2), (joined.workers, 1)):
        for actor in actors:
            actor("fork")
        packed, _ = joined.update(seed)
        assert joined.wrong(seed) == []
        assert packed == once
    assert [actor("memory") for actor in joined.workers] == [0, 0], "the targets were adopted anew"


def test_a_worker_can_join_again_while_the_other_one_stays(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    joined.update(1)
    joined.workers[1].close()
    for rank in joined.ranks:
        rank("call", "lose_worker", joined.peers[1])
    joined.replace(1)
    for seed in (2, 1):
        joined.update(seed)
        assert joined.wrong(seed) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_named_and_nothing_is_written_afterwards(
    number: int, group: Callable[[Case], Group]
) -> None:
    """The rank has packed nothing, so its workers wait for it."""
    joined = group(case(ranks=3))
    joined.update(1)
    info = joined.describe(seconds=4.0)
    joined.ranks[2].kill(number)
    if number == signal.SIGKILL:
        joined.ranks[2].process.join()
    for worker in joined.workers:
        worker.begin("receive", info)
    for rank in joined.ranks[:2]:
        rank.begin("send", 4.0)
    kind = "PeerLostError" if number == signal.SIGKILL else "TransferTimeoutError"
    for worker in joined.workers:
        with pytest.raises(EngineError) as caught:
            worker.end()
        assert caught.value.args[0] == kind
        assert caught.value.args[2] == "trainer rank 2"
    before = [worker("bits") for worker in joined.workers]
    for rank in joined.ranks[:2]:
        with contextlib.suppress(EngineError):  # the workers may have given up before they read its buckets
            rank.end()
        rank("fill", 7)
    assert [worker("bits") for worker in joined.workers] == before
    joined.ranks[2].process.kill()


def test_an_abort_ends_both_sides_and_a_new_group_can_send(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    joined.update(1)
    info = joined.describe()
    joined.workers[0].begin("receive", info)
    joined.workers[0].interrupt()
    with pytest.raises(EngineError) as caught:
        joined.workers[0].end()
    assert caught.value.args[0] in {"TransferError", "PeerLostError"}
    joined.ranks[0].begin("send", 30.0)
    joined.ranks[0].interrupt()
    with pytest.raises(EngineError):
        joined.ranks[0].end()
    for rank in joined.ranks:
        rank("call", "abort_update")
    for number in (0, 1):
        joined.replace(number, join=False)
    joined.join((0, 1))
    for seed in (2, 1):
        joined.update(seed)
        assert joined.wrong(seed) == []


def test_a_trainer_rank_gives_up_at_its_deadline(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    joined.describe()
    with pytest.raises(EngineError) as caught:
        joined.ranks[0]("send", 0.2)
    assert caught.value.args[0] == "TransferTimeoutError"


def test_shares_that_do_not_fit_the_layout_are_refused(group: Callable[[Case], Group]) -> None:
    joined = group(case())
    info = joined.describe()
    info["shares"][1]["addresses"].pop()
    with pytest.raises(EngineError, match="trainer rank 1"):
        joined.workers[0]("receive", info)
    del info["shares"][1]
    with pytest.raises(EngineError, match="2 trainer ranks, of which 1"):
        joined.workers[1]("receive", info)
