"""Calls to several workers at once: which of their failures is the cause, and which are echoes of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from weight_transfer import ManifestMismatchError, PeerLostError, TransferError, TransferTimeoutError
from weight_transfer.session.calls import Calls, cause_of
from weight_transfer.session.peers import Peer

ECHOES = [PeerLostError("lost"), TransferTimeoutError("late")]


class Channel:
    """Nobody calls it."""


def peers(*names: str) -> list[Peer]:
    channel: Any = Channel()
    return [Peer(name, channel, 1) for name in names]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda echo: type(echo).__name__)
def test_the_workers_own_failure_explains_what_the_others_lost(echo: TransferError) -> None:
    healthy, failing = peers("healthy", "failing")
    told = threading.Event()

    def call(peer: Peer) -> None:
        if peer is healthy:
            told.set()
            raise echo
        told.wait(10)
        raise ManifestMismatchError("does not fit")

    calls = Calls([healthy, failing], call, "update")
    explained = calls.explain(PeerLostError("the group ended"))
    assert isinstance(explained, ManifestMismatchError)
    assert explained.peer == "failing"


@pytest.mark.parametrize("echo", ECHOES, ids=lambda echo: type(echo).__name__)
def test_a_worker_that_is_silent_at_the_deadline_explains_what_the_others_lost(echo: TransferError) -> None:
    healthy, silent = peers("healthy", "silent")
    release = threading.Event()

    def call(peer: Peer) -> None:
        if peer is healthy:
            raise echo
        release.wait(10)

    calls = Calls([healthy, silent], call, "update_weights")
    explained = calls.explain(TransferTimeoutError("the deadline has passed"))
    assert isinstance(explained, TransferTimeoutError)
    assert explained.peer == "silent"
    release.set()


def test_a_worker_that_is_gone_explains_what_another_one_says_before() -> None:
    """The one that answers has lost the other, and is there still."""
    healthy, gone = peers("healthy", "gone")
    told = threading.Event()

    def call(peer: Peer) -> None:
        if peer is healthy:
            told.set()
            raise PeerLostError("lost")
        told.wait(10)
        raise PeerLostError("It cannot be reached.", peer="gone")

    calls = Calls([healthy, gone], call, "update")
    explained = calls.explain(PeerLostError("the group ended"))
    assert isinstance(explained, PeerLostError)
    assert explained.peer == "gone"
    assert list(calls.failures) == [gone, healthy]


def test_without_a_better_cause_the_first_failure_is_it() -> None:
    one, other = peers("one", "other")
    assert cause_of({one: ECHOES[0], other: ECHOES[1]}) is ECHOES[0]
    assert cause_of({}) is None
