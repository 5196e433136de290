"""Resources: what is taken is bounded, and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.actors import eventually
from weight_transfer.testing.conformance.cast import LARGE
from weight_transfer.testing.conformance.kit import Kit, needs

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast, Member

_UPDATES = 50
_SETTLE = 5.0  # seconds in which threads and descriptors of the core come back by themselves
_SLACK = {
    "MiB of device memory": 1,  # it is rounded
    "file descriptors": 1,  # the control channel keeps a second connection once an abort has needed one
}


class ResourcesTests(Kit):
    """Descriptors, threads, child processes, shared memory and memory."""

    def test_nothing_accumulates_over_fifty_updates(self, cast: Cast) -> None:
        """After 50 further updates both processes hold what they held after the first few.

        If this fails: the message names what grew. What an update opens it has to close; what is kept from update to
        update has to be looked up before it is made anew.
        """
        worker = cast.worker(in_place=True)
        trainer = cast.trainer([worker], passing=True)
        for version in range(4):
            trainer.ask("send", seed=version, version=version)
        members = [worker, trainer]
        before = [member.ask("held") for member in members]
        for version in range(4, 4 + _UPDATES):
            trainer.ask("send", seed=version, version=version)
        _assert_back(members, before)

    def test_everything_comes_back_when_both_sides_close(self, cast: Cast) -> None:
        """A second pair of engines that joins, transfers and closes leaves both processes as the first one left them.

        If this fails: ``shutdown`` forgets what the message names.
        """
        host, client = cast.worker(), None
        for round_ in range(3):
            worker = cast.worker(beside=host, in_place=True)
            trainer = cast.trainer([worker], passing=True, beside=client)
            client = trainer
            trainer.ask("send", seed=1, version=1)
            trainer.ask("close")
            worker.ask("close")
            if round_ == 0:
                before = [host.ask("held"), client.ask("held")]
        assert client is not None
        _assert_back([host, client], before)

    def test_failed_updates_leave_nothing_behind(self, cast: Cast) -> None:
        """After five updates whose source raises, and the joins that they cost, both processes hold what they held.

        If this fails: ``shutdown`` after an error forgets what the message names, or an error leaves
        ``init_transfer_engine`` or ``open_endpoint`` with something open.
        """
        worker = cast.worker(in_place=True, config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        for version in range(7):
            if version == 2:
                before = [worker.ask("held"), trainer.ask("held")]
            trainer.ask("arm", fail_at=2)
            trainer.tell("send", seed=version, version=version)
            trainer.error(self.deadline + self.grace)
            trainer.ask("arm")
            trainer.ask("send", seed=version, version=version)
        for was in before if cast.in_process else ():
            was["file descriptors"] += 1  # one process has both ends of a second connection
        _assert_back([worker, trainer], before)

    def test_extra_memory_is_bounded_by_the_buckets_and_not_by_the_model(self, cast: Cast) -> None:
        """64 MiB of weights through two buckets of 1 MiB: no process grows by half as much.

        If this fails: the engine keeps a copy of all weights, or hands all of them to ``load_weights`` in one list of
        temporary tensors. Load each bucket as it arrives. ``extra_memory`` tells of staging buffers in bytes.
        """
        config = {"bucket_bytes": 2**20}
        worker = cast.worker(LARGE, in_place=True, config=config)
        trainer = cast.trainer([worker], LARGE, config=config)
        worker.ask("mark")
        sent = trainer.ask("send", seed=1, version=1)
        assert sent["extra_memory"] <= 2 * 2**20
        if cast.in_process:  # what this process's other threads take cannot be told apart
            return
        assert worker.ask("growth")["private"] < 32 * 2**20, "bytes by which the worker grew in the first update"
        for member in (worker, trainer):
            member.ask("mark")
        trainer.ask("send", seed=2, version=2)
        for member, name in ((worker, "worker"), (trainer, "trainer")):
            growth = member.ask("growth")["peak"]
            assert growth < 32 * 2**20, f"bytes by which the {name} grew in the second update"

    @needs(Capability.CROSS_PROCESS)
    def test_a_killed_trainer_leaves_no_shared_memory(self, cast: Cast) -> None:
        """No file in ``/dev/shm`` is left behind, though no exit path of the trainer has run.

        If this fails: use memory without a name (memfd), or unlink the name as soon as all sides have opened it.
        """
        worker = cast.worker(in_place=True)
        before = worker.ask("held")["abandoned files in /dev/shm"]
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        trainer.kill()
        assert eventually(lambda: worker.ask("held")["abandoned files in /dev/shm"] <= before, _SETTLE)


def _assert_back(members: list[Member], before: list[dict[str, int]]) -> None:
    """Fail, and name what grew, unless all members hold no more than before."""

    def grown() -> list[str]:
        return [
            f"{what} of the {role} grew from {was[what]} to {now[what]}"
            for member, role, was in zip(members, ("worker", "trainer"), before, strict=True)
            for now in [member.ask("held")]
            for what in was
            if now[what] > was[what] + _SLACK.get(what, 0)
        ]

    found: list[str] = []

    def is_back() -> bool:
        found[:] = grown()
        return not found

    assert eventually(is_back, _SETTLE), found
