"""Outages: networks, disks and clocks that fail; what is around a process is not its peer's fault."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from weight_transfer.errors import TransferTimeoutError, WeightTransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs
from weight_transfer.testing.models import weight
from weight_transfer.testing.proxy import Proxy

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast, Member

_SLOW = 0.02  # seconds by which all that passes is late
_LARGE = weight("large", "float32", 2**23)  # 32 MiB, for which no memory is left
_PAUSE = 0.3  # seconds
_MANY = [weight(f"part{number}", "float32", 2**19) for number in range(8)]  # more than what sockets hold in between
_DAY = 86_400.0  # seconds


class OutagesTests(Kit):
    """A control channel that is slow, reset or half-open, connections of the data plane that fall silent.

    Files that cannot grow, memory that cannot be had, a wall clock that jumps.
    """

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

    @needs(Capability.CROSS_PROCESS, Capability.CPU)
    def test_a_connection_that_falls_silent_is_an_error_in_time_and_a_pause_is_no_failure(self, cast: Cast) -> None:
        """All packets that come to the worker are lost, but those of the control channel: for a moment, or for good.

        Where weights do not come over TCP connections of this process, updates are good all the same.

        If this fails: a wait for the transport has no deadline, perhaps in ``abort_update`` or ``shutdown``; or it is
        in a library that does not return. What it is in the middle of may arrive later: do not let it be written.
        """
        worker, trainer = cast.worker(_MANY, device="cpu"), None
        for version, is_over in ((1, True), (2, False), (3, True)):
            config = {} if is_over else {"timeout": 2 * self.deadline}
            trainer = cast.trainer([worker], _MANY, beside=trainer, device="cpu", config=config)
            trainer.ask("connect")
            worker.ask("arm", block_at=1)
            trainer.tell("send", seed=version, version=version)
            assert worker.reply() == "blocked"
            worker.ask("silence", silent=True, but=[worker.port])
            worker.ask("release")
            if is_over:
                time.sleep(_PAUSE)
                worker.ask("silence", silent=False, but=[worker.port])
            sent = outcome(trainer, 2 * self.deadline + self.grace)
            if isinstance(sent, WeightTransferError):
                assert not is_over, f"the deadline is longer than the pause: {sent}"
                assert self.settled(worker)["version"] is None
                quiet = worker.ask("hashes")
                worker.ask("silence", silent=False, but=[worker.port])
                time.sleep(_PAUSE)
                assert worker.ask("hashes") == quiet, "written after the error"
            else:
                worker.ask("silence", silent=False, but=[worker.port])
                assert_same(sent["hashes"], worker.ask("hashes"))
            worker.ask("arm")

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
            sent = outcome(trainer, self.deadline + self.grace)
            if isinstance(sent, WeightTransferError):
                assert version == 1, f"there is room again: {sent}"
                assert self.settled(worker)["version"] is None
            else:
                assert_same(sent["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS, Capability.CPU)
    @pytest.mark.parametrize("side", ["trainer", "worker"])
    def test_memory_that_cannot_be_had_is_an_error_or_no_matter(self, cast: Cast, side: str) -> None:
        """In the first update there is none for buckets: an error that says so, and a good update when there is.

        Who needs none sends as ever. Nobody dies of it.

        If this fails: let `MemoryError`, `OSError` and torch's error through, and keep nothing of what was begun. What
        another process is to allocate it has to answer for.
        """
        config = {"timeout": self.grace, "bucket_bytes": "32MiB"}
        worker = cast.worker([_LARGE], in_place=True, device="cpu", config=config)
        trainer = cast.trainer([worker], [_LARGE], passing=True, device="cpu", config=config)
        trainer.ask("connect")
        for version in (1, 2, 3):
            is_scarce = version == 1
            worker.ask("limit_memory", limited=is_scarce and side == "worker")
            trainer.tell("send", seed=version, version=version, scarce=is_scarce and side == "trainer")
            sent = outcome(trainer, self.deadline + self.grace)
            worker.ask("limit_memory", limited=False)
            if isinstance(sent, WeightTransferError):
                assert is_scarce, f"there is memory again: {sent}"
                assert "memory" in str(sent).lower(), str(sent)
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


def outcome(trainer: Member, within: float) -> dict[str, Any] | WeightTransferError:
    """Return what a trainer replies to ``send``, or the error that it does."""
    try:
        sent: dict[str, Any] = trainer.reply(within)
    except WeightTransferError as error:
        return error
    return sent
