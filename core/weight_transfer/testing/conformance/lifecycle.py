"""Lifecycle: the order of calls, repeated and unusual ones included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from weight_transfer.config.structuring import structure, unstructure
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import (
    HandshakeError,
    LifecycleError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
)
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.cast import Cast, plays
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs, within
from weight_transfer.values.deadline import Deadline

_INTERVAL = 0.2  # seconds
_LONE = [WorkerSlot(peer="nobody", rank_offset=1, count=1, world_size=2)]


class LifecycleTests(Kit):
    """Shutdown, abort, joining again, and engines beside each other."""

    @pytest.mark.usefixtures("cast")
    def test_shutdown_and_abort_may_come_in_any_state_and_twice(self) -> None:
        """Before anything was acquired, and between opening an endpoint and joining.

        If this fails: let ``shutdown`` and ``abort_update`` look at what there is, give it back, and forget it.
        """
        for engine in self.engines():
            for call in (engine.abort_update, engine.shutdown, engine.shutdown, engine.abort_update):
                within(self.grace, call)
        worker, trainer = self.engines()
        trainer.open_endpoint(_LONE, Deadline(5))
        for call in (trainer.abort_update, trainer.shutdown, trainer.shutdown, worker.shutdown):
            within(self.grace, call)

    @pytest.mark.usefixtures("cast")
    def test_a_trainer_does_not_wait_for_an_absent_worker_beyond_the_deadline(self) -> None:
        """``join_workers`` raises `TransferTimeoutError` when nobody comes, or leaves the waiting to the core.

        If this fails: give every wait in ``join_workers`` the time that ``deadline.remaining()`` says.
        """
        _, trainer = self.engines()
        try:
            trainer.open_endpoint(_LONE, Deadline(5))
            with suppress(TransferTimeoutError):
                within(self.grace, lambda: trainer.join_workers(Deadline(0.5)))
        finally:
            trainer.shutdown()

    @pytest.mark.usefixtures("cast")
    def test_a_trainer_that_waits_for_workers_can_be_interrupted(self) -> None:
        """``abort_update`` from another thread ends ``join_workers`` long before its deadline.

        If this fails: let ``abort_update`` close or wake whatever ``join_workers`` waits on.
        """
        _, trainer = self.engines()
        try:
            trainer.open_endpoint(_LONE, Deadline(5))

            def interrupted() -> None:
                with suppress(TransferError), _Interrupter(trainer.abort_update):
                    trainer.join_workers(Deadline(10 * self.grace))

            within(self.grace, interrupted)
        finally:
            trainer.shutdown()

    def test_a_worker_can_be_initialised_again_by_another_trainer(self, cast: Cast) -> None:
        """A worker outlives its trainer, and takes every bit of the next one's weights.

        If this fails: an engine keeps something of an earlier connection; the core makes a new one for each join, so
        look for state that is shared by a class or a module.
        """
        worker = cast.worker()
        first = cast.trainer([worker])
        assert_same(first.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))
        first.ask("close")
        second = cast.trainer([worker], beside=first)
        assert_same(second.ask("send", seed=2, version=2)["hashes"], worker.ask("hashes"))
        third = cast.trainer([worker])
        assert_same(third.ask("send", seed=3, version=3)["hashes"], worker.ask("hashes"))

    def test_two_engines_of_one_process_share_nothing(self, cast: Cast) -> None:
        """Two trainers in one process send different weights to two workers in another one, by turns.

        If this fails: the engines share a socket, a buffer or a table, through a class attribute or a module's
        variable. Keep such state in the instance, or under a key that is unique per engine.
        """
        left = cast.worker()
        right = cast.worker(beside=left)
        first = cast.trainer([left])
        second = cast.trainer([right], beside=first)
        for seed in (1, 2):
            one = first.ask("send", seed=seed, version=seed)["hashes"]
            other = second.ask("send", seed=10 + seed, version=seed)["hashes"]
            assert_same(one, left.ask("hashes"))
            assert_same(other, right.ask("hashes"))
        first.ask("close")
        assert_same(second.ask("send", seed=20, version=20)["hashes"], right.ask("hashes"))

    def test_a_stale_invitation_is_an_error_in_time(self, cast: Cast) -> None:
        """A worker that is told to join a trainer that has gone raises, and can join a living one afterwards.

        If this fails: bound every wait of ``init_transfer_engine`` by ``init_info.timeout``, and let its errors be
        `HandshakeError`, `PeerLostError` or `TransferTimeoutError`.
        """
        worker = cast.worker()
        gone = cast.trainer([worker])
        gone.ask("send", seed=1, version=1)
        [sent] = gone.ask("infos")
        gone.ask("close")
        since = time.monotonic()
        worker.tell("init", info=sent["init"][0] | {"timeout": self.deadline})
        error = worker.error(self.deadline + self.grace)
        assert isinstance(error, (HandshakeError, PeerLostError, TransferTimeoutError)), repr(error)
        assert time.monotonic() - since < self.deadline + self.grace
        living = cast.trainer([worker])
        assert_same(living.ask("send", seed=2, version=2)["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    def test_a_trainer_that_is_stopped_is_not_joined_for_ever(self, cast: Cast) -> None:
        """A worker that is invited by a trainer process that is frozen (SIGSTOP) raises in time, if it has to wait.

        If this fails: a wait of ``init_transfer_engine`` ends by nothing but the trainer's answer, perhaps one in the
        library. Bound it by ``init_info.timeout``, on a thread of its own if need be.
        """
        worker = cast.worker()
        trainer = cast.inviter()
        invitation = trainer.ask("invite", timeout=self.deadline)
        with trainer.stopped():
            worker.tell("init", info=invitation)
            with suppress(HandshakeError, PeerLostError, TransferTimeoutError):
                worker.reply(self.deadline + self.grace)
        living = cast.trainer([worker])
        assert_same(living.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))

    @pytest.mark.usefixtures("cast")
    def test_a_worker_that_joins_can_be_interrupted(self) -> None:
        """``abort_update`` from another thread ends ``init_transfer_engine`` long before its deadline.

        If this fails: let ``abort_update`` close or wake whatever ``init_transfer_engine`` waits on.
        """
        worker, trainer = self.engines()
        try:
            [fields] = trainer.open_endpoint(_LONE, Deadline(5))
            common = {"rank_offset": 1, "world_size": 2, "timeout": 10 * self.grace}
            wire = unstructure(structure({**fields, **common}, worker.init_info_cls, "init_info"))

            def interrupted() -> None:
                with suppress(TransferError), _Interrupter(worker.abort_update):
                    worker.init_transfer_engine(worker.parse_init_info(wire))

            within(self.grace, interrupted)
        finally:
            worker.shutdown()
            trainer.shutdown()

    def test_a_closed_sender_refuses_to_send(self, cast: Cast) -> None:
        """`LifecycleError` comes from the core; the engine has been shut down, and stays so.

        If this fails: ``shutdown`` of the trainer's engine raised, or did not return.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        trainer.ask("close_sender")
        trainer.tell("send", seed=2, version=2)
        assert isinstance(trainer.error(), LifecycleError)
        assert worker.ask("status")["version"] == 1

    @plays(workers=2)
    def test_workers_of_one_process_join_the_same_trainer(self, cast: Cast) -> None:
        """Two workers that live in one process get the same update at once.

        If this fails: as with engines that share something; or one waits for the other while it holds a lock.
        """
        left = cast.worker()
        right = cast.worker(rank=2, beside=left)
        trainer = cast.trainer([left, right])
        for seed in (1, 2):
            sent = trainer.ask("send", seed=seed, version=seed)["hashes"]
            assert_same(sent, left.ask("hashes"), right.ask("hashes"))


class _Interrupter:
    """Calls ``abort`` from another thread, again and again as the core does, while a ``with`` block runs.

    A single call may come before there is anything to abort: a process may take seconds to set up its GPU.
    """

    def __init__(self, abort: Callable[[], object]) -> None:
        self._abort = abort
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(_INTERVAL):
            self._abort()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
