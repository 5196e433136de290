"""Sessions: a worker is one trainer's at a time, and no byte of another one reaches its model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from weight_transfer.errors import ReplacedError
from weight_transfer.testing.conformance.kit import Kit, assert_same

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast, Member


class SessionsTests(Kit):
    """Two trainers with one worker: of one that was replaced the core refuses the calls, the backend the bytes."""

    def test_each_new_trainer_takes_a_worker_over(self, cast: Cast) -> None:
        """Each version has the bits of the trainer that published it; one that was replaced is refused.

        If this fails: an engine reads from, or writes into, a connection of the trainer before. The core makes a new
        worker's engine for each join; keep connections in the instance.
        """
        worker = cast.worker()
        first = cast.trainer([worker])
        second = cast.trainer([worker])
        third = cast.trainer([worker], beside=first)
        for version, (trainer, seed) in enumerate([(first, 1), (second, 2), (second, 3), (third, 4), (third, 5)]):
            sent = trainer.ask("send", seed=seed, version=version)["hashes"]
            assert_same(sent, worker.ask("hashes"))
            assert worker.ask("status")["version"] == version
        for replaced in (first, second):
            replaced.tell("send", seed=6, version=6)
            self._is_refused(replaced)
        assert_same(sent, worker.ask("hashes"))

    @pytest.mark.parametrize("call", ["init", "start", "update", "finish"])
    def test_a_trainer_that_was_replaced_and_goes_on_changes_nothing(self, cast: Cast, call: str) -> None:
        """A trainer stands still before a call, another one takes its worker over, and then the first one goes on.

        If this fails: the stale trainer still reached the worker's model, over a connection that ``shutdown`` of the
        worker's engine had to close; or its own engine hangs when that connection is gone.
        """
        worker = cast.worker(in_place=True)
        stale = cast.trainer([worker])
        if call != "init":
            stale.ask("send", seed=1, version=1)
        stale.ask("hold", at=call)
        stale.tell("send", seed=2, version=2)
        assert stale.reply() == "held"
        with nullcontext() if cast.in_process else stale.stopped():
            successor = cast.trainer([worker])
            sent = successor.ask("send", seed=3, version=3)["hashes"]
            assert_same(sent, worker.ask("hashes"))
        stale.tell("release")
        self._is_refused(stale)
        assert worker.ask("status")["version"] == 3
        assert_same(sent, worker.ask("hashes"))
        assert_same(successor.ask("send", seed=4, version=4)["hashes"], worker.ask("hashes"))
        stale.tell("send", seed=5, version=5)
        self._is_refused(stale)

    def _is_refused(self, replaced: Member) -> None:
        error = replaced.error(self.settings()["timeout"] + self.grace)
        assert isinstance(error, ReplacedError), repr(error)
