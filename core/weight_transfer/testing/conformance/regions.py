"""Regions: each worker gets what it keeps, and no more, straight from the trainer ranks that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.cast import Member, plays
from weight_transfer.testing.conformance.company import Company
from weight_transfer.testing.conformance.kit import Kit, needs
from weight_transfer.testing.keeping import COLUMNS, EXPERTS, ROWS, WHOLE
from weight_transfer.testing.models import weight
from weight_transfer.testing.shards import ALONE, WEIGHTS

_SIZES = {"plain": (1,), "fsdp": (2, 4), "hsdp": (4,), "tp": (4, 2), "grid": (4,), "megatron": (1, 2, 4)}
_COUNTS = {WHOLE: (2, 1), ROWS: (2, 4), COLUMNS: (4, 2), EXPERTS: (1, 2, 4)}
_PAIRS = [
    (layout, sizes[there % len(sizes)], kind, counts[(here + there) % len(counts)])
    for here, (layout, sizes) in enumerate(_SIZES.items())
    for there, (kind, counts) in enumerate(_COUNTS.items())
]
"""Each trainer's layout with each worker's; their numbers of ranks and workers take turns."""

_COMPANY = pytest.StashKey[Company]()
_LARGE = [weight(f"w{index}", "bfloat16", 257, 2048) for index in range(16)]  # 16 MiB
_TABLES = 2**17  # bytes for what is planned of them
_ALONE = [*WEIGHTS[:5], ALONE, *WEIGHTS[5:]]

layouts = pytest.mark.parametrize(
    ("layout", "size", "kind", "workers"),
    _PAIRS,
    ids=[f"{layout} on {size}-{kind} on {workers}" for layout, size, kind, workers in _PAIRS],
)


class RegionsKit(Kit):
    """What the groups about regions share."""

    @pytest.fixture
    def company(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Company:
        """Trainers of several ranks, and workers, that all tests of the class use; started when one asks for them."""
        self.require_machine()
        tests = request.node.getparent(pytest.Class)
        if _COMPANY not in tests.stash:
            tests.stash[_COMPANY] = Company(self.settings, tmp_path_factory.mktemp("ranks"))
            tests.addfinalizer(tests.stash[_COMPANY].end)
        found: Company = tests.stash[_COMPANY]
        found.device = self.device_of
        return found


class RegionsTests(RegionsKit):
    """Trainers of 1, 2 and 4 ranks, sharded by FSDP2, by DTensor or by themselves; workers that keep all, or a part.

    Every process knows what bits each weight ought to have. Workers compare their own memory with that, and see that
    nothing was written beside it.
    """

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @layouts
    def test_every_layout_reaches_every_layout(
        self, company: Company, layout: str, size: int, kind: str, workers: int
    ) -> None:
        """Three updates, A, B and A again; each worker counts as many bytes as it keeps, and none were gathered.

        If this fails: pieces are copied by other strides than those of the shard and of the target, or from another
        rank than ``pieces.rank`` says; or ``incoming.moved`` is told of something else than what was written. If only
        the second or third update is wrong, something is kept from the one before.
        """
        with company.troupe(size) as troupe:
            keepers = troupe.workers(kind, workers)
            trainer = troupe.trainer(layout, size, keepers)
            by_region = size > 1 or layout == "megatron" or kind in (ROWS, COLUMNS) or (kind == EXPERTS and workers > 1)
            for version, seed in enumerate((1, 2, 1)):
                reports = trainer.send(seed, version)
                assert_kept(keepers, seed, version)
                assert [report["changed"] for report in reports] == [[]] * size, "the trainer's shards were changed"
                assert_counted(reports, keepers, by_region)

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @plays(ranks=2, workers=3)
    def test_a_weight_that_one_worker_takes_whole_goes_whole_to_all(self, company: Company) -> None:
        """Of three workers one has a loader for a weight; it is gathered, and arrives on all, beside the regions.

        If this fails: ``receive_regions`` or ``send_regions`` spoils what `receive_weights` has used in the same
        update, such as a ring, a group or a connection.
        """
        with company.troupe(2) as troupe:
            keepers = troupe.workers(ROWS, 3, _ALONE, alone=(None, "loader", None))
            trainer = troupe.trainer("tp", 2, keepers, _ALONE)
            for version, seed in enumerate((1, 2, 1)):
                reports = trainer.send(seed, version)
                assert_kept(keepers, seed, version)
                assert reports[0]["gathered"] == 2 * 5 * 70
                kept = [report["kept"] for report in reports]
                assert kept[0] == kept[1] and sum(kept[0].values()) == sum(reports[0]["given"]) > 0

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @plays(ranks=2, workers=2)
    def test_a_weight_that_one_worker_copies_by_its_name_goes_by_region(self, company: Company) -> None:
        """Of two workers one has a model's own weight without a declared target: that is a target itself.

        If this fails: see the layouts; the targets of one update may lie in any memory of the worker's.
        """
        with company.troupe(2) as troupe:
            keepers = troupe.workers(ROWS, 2, _ALONE, alone=(None, "name"))
            trainer = troupe.trainer("fsdp", 2, keepers, _ALONE)
            for version, seed in enumerate((1, 2, 1)):
                reports = trainer.send(seed, version)
                assert_kept(keepers, seed, version)
                assert reports[0]["gathered"] == 0

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @plays(ranks=4, workers=2)
    def test_the_trainer_may_have_other_ranks_and_another_layout_at_each_update(self, company: Company) -> None:
        """Elastic: 2 ranks, then 1, then 4, then 2 again, to the same workers.

        If this fails: a worker's engine keeps a plan, a mapping or a connection of ranks that it has joined before.
        """
        with company.troupe(4) as troupe:
            keepers = troupe.workers(COLUMNS, 2)
            for version, (layout, size) in enumerate([("fsdp", 2), ("plain", 1), ("grid", 4), ("fsdp", 2)]):
                troupe.trainer(layout, size, keepers).send(version, version)
                assert_kept(keepers, version, version)

    @needs(Capability.REGIONS, Capability.CROSS_PROCESS)
    @pytest.mark.parametrize(("layout", "kind"), [("fsdp", ROWS), ("tp", ROWS), ("megatron", COLUMNS)])
    @plays(ranks=2, workers=2)
    def test_extra_memory_of_both_sides_is_bounded_by_the_buckets(
        self, company: Company, layout: str, kind: str
    ) -> None:
        """8 MiB of each rank and for each worker, by two buckets of 64 KiB: nobody takes or tells of half as much.

        If this fails: the engine packs more than a bucket at a time, or copies shards or targets that are strided.
        """
        config = {"bucket_bytes": 2**16}
        with company.troupe(2) as troupe:
            keepers = troupe.workers(kind, 2, _LARGE, config=config)
            trainer = troupe.trainer(layout, 2, keepers, _LARGE, config=config)
            trainer.send(1, 1)
            members = [*keepers, *trainer.ranks]
            for member in members:
                member.ask("mark")
            reports = trainer.send(2, 2)
            grown = [member.ask("growth")["private"] for member in members]
            assert_kept(keepers, 2, 2)
            bound = 2 * 2**16 + _TABLES
            assert all(report["extra_memory"] <= bound for report in reports), reports
            assert all(keeper.ask("extra_memory") <= bound for keeper in keepers)
            assert max(grown) < 4 * 2**20, f"bytes by which the workers and the ranks grew: {grown}"


def assert_kept(workers: Sequence[Member], seed: int, version: int) -> None:
    """Fail, and name the regions, unless workers have the bits of a seed, and serve that version."""
    for worker in workers:
        worker.tell("unlike", seed=seed)
    for number, worker in enumerate(workers):
        wrong = worker.reply()
        assert not wrong, f"worker {number} has other bits in {len(wrong)} places: {wrong[:5]}"
        assert worker.ask("status")["version"] == version


def assert_counted(reports: Sequence[dict[str, Any]], workers: Sequence[Member], by_region: bool) -> None:
    """Fail unless the bytes that went by region are those that the workers keep, by every rank's report."""
    keeps = {worker.url: worker.ask("kept") if by_region else 0 for worker in workers}
    for report in reports:
        assert report["kept"] == {url: nbytes for url, nbytes in keeps.items() if nbytes}
        assert sum(report["given"]) == sum(keeps.values())
        assert report["gathered"] == 0
    answers = [worker.ask("answer") for worker in workers]
    for worker, answer in zip(workers, answers, strict=True):
        assert sum(answer.get("moved", ())) == keeps[worker.url], (
            "the engine has counted other bytes than it was to move"
        )
    if by_region:
        given = [sum(counts) for counts in zip(*(answer["moved"] for answer in answers), strict=True)]
        assert list(reports[0]["given"]) == given
