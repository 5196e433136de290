"""Faults: each is an error of the right class, in time, and leaves the worker's memory quiet."""

from __future__ import annotations

from typing import Any

import pytest

from weight_transfer.errors import (
    ManifestMismatchError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
    WeightTransferError,
    error_from_dict,
)
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.actors import eventually
from weight_transfer.testing.conformance.cast import PLAIN, Cast, plays
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs
from weight_transfer.testing.models import weight

_LATE = 0.5  # seconds in which a late write would be seen


class FaultsTests(Kit):
    """Peers that die, stand still, fail or disagree. Every test ends with an update that mends what it broke."""

    @needs(Capability.CROSS_PROCESS)
    @plays(workers=2)
    def test_a_worker_killed_in_an_update_is_named_and_comes_back(self, cast: Cast) -> None:
        """`PeerLostError` that names it, long before the deadline; the survivor serves nothing torn; both are mended.

        If this fails: watch the connection to each worker while bytes move, and let ``abort_update`` wake every wait.
        The core names the worker: it sees the control channel break.
        """
        victim, survivor = cast.workers(2)
        trainer = cast.trainer([victim, survivor])
        trainer.ask("send", seed=1, version=1)
        victim.ask("arm", block_at=1)
        trainer.tell("send", seed=2, version=2)
        assert victim.reply() == "blocked"
        victim.kill()
        error = trainer.error(self.grace)
        assert isinstance(error, PeerLostError), repr(error)
        assert error.peer == victim.url
        assert error.version == 2
        assert survivor.ask("status")["version"] in (None, 1)  # 1 if not a byte had arrived
        back = cast.worker(port=victim.port)
        sent = trainer.ask("send", seed=3, version=3)
        assert_same(sent["hashes"], back.ask("hashes"), survivor.ask("hashes"))
        assert sent["workers"] == [victim.url, survivor.url]

    @needs(Capability.CROSS_PROCESS)
    def test_a_trainer_killed_in_an_update_leaves_no_version_and_another_takes_over(self, cast: Cast) -> None:
        """The worker fails within the update's deadline, serves nothing, and joins the next trainer.

        If this fails: ``receive_weights`` waits without a deadline, or does not notice that the connection is gone; or
        what it raises at the end of the stream is none of `PeerLostError` and `TransferTimeoutError`.
        """
        worker = cast.worker(in_place=True, config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        trainer.ask("send", seed=1, version=1)
        trainer.ask("arm", block_at=2)
        trainer.tell("send", seed=2, version=2)
        assert trainer.reply() == "blocked"
        worker.await_update()
        trainer.kill()
        status = self.settled(worker)
        assert status["version"] in (None, 1)  # 1 if not a byte had arrived
        assert status["error"]
        if failure := worker.ask("failure"):  # it had been told of the update
            assert isinstance(error_from_dict(failure), (PeerLostError, TransferTimeoutError)), failure
        successor = cast.trainer([worker])
        assert_same(successor.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    def test_a_worker_that_hangs_is_a_timeout_and_is_given_nothing_afterwards(self, cast: Cast) -> None:
        """A loader that does not return: `TransferTimeoutError` at the trainer, and no further call of the loader.

        If this fails: ``send_weights`` waits longer than its deadline says, or ``receive_weights`` goes on with
        loading after ``load_weights`` has raised.
        """
        worker = cast.worker(config=self.hasty())
        trainer = cast.trainer([worker], config=self.hasty())
        trainer.ask("send", seed=1, version=1)
        worker.ask("arm", block_at=1)
        trainer.tell("send", seed=2, version=2)
        assert worker.reply() == "blocked"
        error = trainer.error(self.deadline + self.grace)
        assert isinstance(error, TransferTimeoutError), repr(error)
        assert error.peer
        worker.ask("release")
        assert self.settled(worker)["version"] is None
        assert worker.ask("calls") == 1
        worker.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    def test_a_worker_that_is_stopped_is_a_timeout(self, cast: Cast) -> None:
        """A worker process that is frozen (SIGSTOP) in the middle of an update: `TransferTimeoutError`; it recovers.

        If this fails: a wait for the worker has no deadline, perhaps one in ``abort_update`` or ``shutdown``.
        """
        worker = cast.worker(config=self.hasty())
        trainer = cast.trainer([worker], config=self.hasty())
        trainer.ask("send", seed=1, version=1)
        worker.ask("arm", block_at=1)
        trainer.tell("send", seed=2, version=2)
        assert worker.reply() == "blocked"
        with worker.stopped():
            error = trainer.error(self.deadline + self.grace)
            assert isinstance(error, TransferTimeoutError), repr(error)
        worker.ask("release")
        assert self.settled(worker)["version"] is None
        worker.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    @pytest.mark.parametrize("at", [0, 2], ids=["before the first byte", "between two"])
    def test_a_trainer_that_is_stopped_is_a_timeout(self, cast: Cast, at: int) -> None:
        """A trainer process that is frozen (SIGSTOP): the worker fails with `TransferTimeoutError`, by itself.

        If this fails: a wait in ``receive_weights`` has no deadline; nobody else ends it, for nobody says anything.
        """
        worker = cast.worker(in_place=True, config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        served = trainer.ask("send", seed=1, version=1)["hashes"]
        trainer.ask("arm", block_at=at)
        trainer.tell("send", seed=2, version=2)
        assert trainer.reply() == "blocked"
        worker.await_update()
        with trainer.stopped():
            status = self.settled(worker)
            assert status["version"] in (None, 1)
            if status["version"] == 1:
                assert_same(served, worker.ask("hashes"))
            if failure := worker.ask("failure"):  # it had been told of the update
                assert isinstance(error_from_dict(failure), TransferTimeoutError), failure
        trainer.tell("release")
        trainer.error(self.deadline + self.grace)
        trainer.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    @pytest.mark.parametrize("at", [0, 2], ids=["before the first byte", "between two"])
    def test_a_worker_that_aborts_does_not_wait_for_the_trainer(self, cast: Cast, at: int) -> None:
        """A worker gives up an update whose trainer is slow: it does so at once, and writes nothing afterwards.

        If this fails: ``abort_update`` does not end a wait of ``receive_weights``. Where a library cannot abort an
        operation, break its connection.
        """
        worker = cast.worker(in_place=True, config=self._patient())
        trainer = cast.trainer([worker], passing=True, config=self._patient())
        served = trainer.ask("send", seed=1, version=1)["hashes"]
        trainer.ask("arm", block_at=at)
        trainer.tell("send", seed=2, version=2)
        assert trainer.reply() == "blocked"
        worker.await_update()
        worker.tell("abort")
        worker.reply(self.grace)
        status = worker.ask("status")
        assert status["state"] != "updating" and status["version"] in (None, 1)
        if status["version"] == 1:
            assert_same(served, worker.ask("hashes"))
        quiet = worker.ask("hashes")
        trainer.tell("release")
        error = trainer.error(self.grace)
        assert isinstance(error, WeightTransferError), repr(error)
        assert worker.ask("hashes") == quiet, "written after the abort"
        trainer.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    def test_after_the_deadline_nothing_is_written_even_if_the_trainer_goes_on(self, cast: Cast) -> None:
        """The trainer's source stands still until the worker has given up, and then yields the rest.

        If this fails: something still receives after ``receive_weights`` has raised: a thread, a posted receive, a
        one-sided write. End it, or wait for it, before the error leaves ``receive_weights``.
        """
        worker = cast.worker(in_place=True, config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        trainer.ask("send", seed=1, version=1)
        trainer.ask("arm", block_at=2)
        trainer.tell("send", seed=2, version=2)
        assert trainer.reply() == "blocked"
        assert self.settled(worker)["version"] in (None, 1)
        quiet = worker.ask("hashes")
        trainer.tell("release")
        error = trainer.error(self.deadline + self.grace)
        assert isinstance(error, WeightTransferError), repr(error)
        assert not eventually(lambda: worker.ask("hashes") != quiet, within=_LATE), "written after the error"
        trainer.ask("arm")
        sent = trainer.ask("send", seed=3, version=3)["hashes"]
        assert_same(sent, worker.ask("hashes"))

    def test_a_loader_that_raises_is_told_to_the_trainer(self, cast: Cast) -> None:
        """`TransferError` with the loader's text; the worker has failed; the next update mends it.

        If this fails: let what ``load_weights`` raises through ``receive_weights``, and wake the trainer.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        worker.ask("arm", fail_at=1)
        trainer.tell("send", seed=2, version=2)
        error = trainer.error(self.grace)
        assert isinstance(error, TransferError), repr(error)
        assert "the loader was told to fail" in str(error)
        assert self.settled(worker)["version"] is None
        worker.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    def test_a_source_that_raises_ends_the_update_on_both_sides(self, cast: Cast) -> None:
        """`TransferError` with the source's text at the trainer; the worker ends its update by the deadline.

        If this fails: ``abort_update`` or the deadline does not end the worker's ``receive_weights``.
        """
        worker = cast.worker(config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        trainer.ask("send", seed=1, version=1)
        trainer.ask("arm", fail_at=2)
        trainer.tell("send", seed=2, version=2)
        error = trainer.error(self.deadline + self.grace)
        assert isinstance(error, TransferError), repr(error)
        assert "the source was told to fail" in str(error)
        assert self.settled(worker)["version"] in (None, 1)
        trainer.ask("arm")
        assert_same(trainer.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    def test_a_manifest_that_differs_changes_nothing(self, cast: Cast) -> None:
        """The worker's model has a weight of another shape: `ManifestMismatchError`, and every byte as it was.

        If this fails: something was written before the first ``load_weights``, or ``abort_update`` hides the cause.
        """
        worker = cast.worker([*PLAIN[:-1], weight("layer5_bias", "float32", 127)], in_place=True, config=self.hasty())
        before = worker.ask("hashes")
        trainer = cast.trainer([worker], config=self.hasty())
        trainer.tell("send", seed=1, version=1)
        error = trainer.error(self.deadline + self.grace)
        assert isinstance(error, ManifestMismatchError), repr(error)
        assert "layer5_bias" in str(error)
        assert worker.ask("hashes") == before
        fitting = cast.worker(in_place=True)
        trainer = cast.trainer([fitting])
        assert_same(trainer.ask("send", seed=2, version=2)["hashes"], fitting.ask("hashes"))

    @needs(Capability.CROSS_PROCESS, Capability.REJOIN)
    @plays(workers=2)
    def test_with_continue_the_others_publish_when_a_worker_dies(self, cast: Cast) -> None:
        """With ``on_worker_failure = "continue"`` one worker's death costs the others nothing; it may come back alone.

        If this fails: drop a worker whose connection breaks and go on with the others, or do not declare
        `Capability.REJOIN`.
        """
        going_on = {"on_worker_failure": "continue"}
        victim, survivor = cast.workers(2, config=going_on)
        trainer = cast.trainer([victim, survivor], config=going_on)
        trainer.ask("send", seed=1, version=1)
        victim.ask("arm", block_at=1)
        trainer.tell("send", seed=2, version=2)
        assert victim.reply() == "blocked"
        victim.kill()
        sent = trainer.reply(self.grace)
        assert [peer for peer, _ in sent["lost"]] == [victim.url]
        assert_same(sent["hashes"], survivor.ask("hashes"))
        assert survivor.ask("status")["version"] == 2
        back = cast.worker(port=victim.port, config=going_on)
        sent = trainer.ask("send", seed=3, version=3)
        assert sent["lost"] == []
        assert_same(sent["hashes"], back.ask("hashes"), survivor.ask("hashes"))

    @needs(Capability.CROSS_PROCESS, Capability.REJOIN)
    @pytest.mark.parametrize("passing", [False, True], ids=["resident", "passing"])
    @plays(workers=2)
    def test_with_continue_a_worker_that_refuses_does_not_hold_the_others_up(self, cast: Cast, passing: bool) -> None:
        """A worker whose model does not fit says so over the control channel alone, and its connection stays as it is.

        If this fails: the trainer's engine goes on waiting for the worker that `lose_worker` has named.
        """
        going_on = {"on_worker_failure": "continue"} | self._patient()
        other = cast.worker(PLAIN[:-1], in_place=True, config=going_on)
        fitting = cast.worker(rank=2, config=going_on)
        trainer = cast.trainer([other, fitting], config=going_on, passing=passing)
        for version in (1, 2):
            trainer.tell("send", seed=version, version=version)
            sent = trainer.reply(self.grace)
            assert [peer for peer, _ in sent["lost"]] == [other.url]
            assert_same(sent["hashes"], fitting.ask("hashes"))
            assert fitting.ask("status")["version"] == version

    def _patient(self) -> dict[str, Any]:
        return {"timeout": 4 * self.grace}
