"""Outages: networks, disks and clocks that fail; what is around a process is not its peer's fault."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from weight_transfer.errors import TransferTimeoutError, WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs
from weight_transfer.testing.proxy import Proxy

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast

_SLOW = 0.02  # seconds by which all that passes is late
_DAY = 86_400.0  # seconds


class OutagesTests(Kit):
    """A control channel that is slow, reset or half-open; files that cannot grow; a wall clock that jumps."""

    def test_a_control_channel_that_fails_is_known_in_time_and_that_it_is_slow_is_no_failure(self, cast: Cast) -> None:
        """It is slow: the update is good. It is reset, or passes nothing: an error in time; afterwards all is well.

        Nothing is written afterwards, though the worker's abort was lost, too.

        If this fails: ``abort_update`` waits for the other side, which may never hear of it; or ``receive_weights``
        goes on because nobody has told the worker to give up.
        """
        worker = cast.worker(config=self.hasty())
        with closing(Proxy(worker.port)) as proxy:
            worker.url = proxy.url
            trainer = cast.trainer([worker], config=self.hasty())
            proxy.delay = _SLOW
            assert_same(trainer.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))
            proxy.delay = 0.0
            for version, is_half_open in ((2, False), (4, True)):
                worker.ask("arm", block_at=1)
                trainer.tell("send", seed=version, version=version)
                assert worker.reply() == "blocked"
                proxy.swallows = is_half_open
                if not is_half_open:
                    proxy.reset()
                error = trainer.error(self.deadline + self.grace)
                assert isinstance(error, TransferTimeoutError if is_half_open else WeightTransferError), repr(error)
                worker.ask("release")
                assert self.settled(worker)["version"] is None
                assert worker.ask("calls") == 1
                proxy.swallows = False
                proxy.reset()  # what was swallowed is missing in the middle of what comes
                worker.ask("arm")
                sent = trainer.ask("send", seed=version + 1, version=version + 1)
                assert_same(sent["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    @pytest.mark.parametrize("side", ["trainer", "worker"])
    def test_files_that_cannot_grow_are_an_error_or_no_matter(self, cast: Cast, side: str) -> None:
        """A full disk, or a full ``/dev/shm``: `WeightTransferError` in time, and a good update when there is room.

        Who needs no file sends as ever.

        If this fails: let `OSError` through, or say what could not be had, and keep nothing of what was begun.
        """
        worker = cast.worker(in_place=True, config=self.hasty())
        trainer = cast.trainer([worker], passing=True, config=self.hasty())
        member = trainer if side == "trainer" else worker
        for version in (1, 2):
            member.ask("limit_files", limited=version == 1)
            trainer.tell("send", seed=version, version=version)
            try:
                sent: dict[str, Any] = trainer.reply(self.grace + self.deadline)
            except WeightTransferError:
                assert version == 1, "there is room again"
                assert self.settled(worker)["version"] is None
            else:
                assert_same(sent["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    def test_a_clock_that_jumps_matters_to_nobody(self, cast: Cast) -> None:
        """By a day, forth and back, on both sides, amid an update and between two: all updates are good.

        If this fails: measure time with ``time.monotonic``, or ask ``deadline.remaining()``.
        """
        worker = cast.worker(in_place=True)
        trainer = cast.trainer([worker], passing=True)
        for version, seconds in enumerate((_DAY, -_DAY)):
            trainer.ask("arm", block_at=2)
            trainer.tell("send", seed=version, version=version)
            assert trainer.reply() == "blocked"
            worker.await_update()
            worker.ask("shift_clock", seconds=seconds)
            trainer.tell("release")
            assert_same(trainer.reply()["hashes"], worker.ask("hashes"))
            trainer.ask("shift_clock", seconds=-seconds)
