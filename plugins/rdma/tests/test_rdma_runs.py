"""In which order transfers begin and end, and what peers are told of their buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from weight_transfer_rdma.runs import Runs

if TYPE_CHECKING:
    from weight_transfer_rdma.nixl import Channel


class FakeAgent:
    """Transfers are numbers; ``channels`` are theirs, and those in ``ended`` have ended."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self.posted: list[int] = []
        self.ended: set[int] = set()
        self.filled: dict[Channel, int] = {}
        self.read: dict[Channel, int] = {}
        self.lost: set[str] = set()
        self.told = True

    def channel(self, handle: int) -> Channel:
        return self._channels[handle]

    def post(self, handle: int) -> None:
        self.posted.append(handle)

    def done(self, handle: int) -> bool:
        if self._channels[handle][1] in self.lost:
            raise ConnectionError
        return handle in self.ended

    def is_filled(self, channel: Channel, bucket: int) -> bool:
        return self.filled.get(channel, 0) >= bucket

    def note_read(self, channel: Channel, bucket: int) -> None:
        self.read[channel] = bucket

    def has_told(self) -> bool:
        return self.told


ONE, TWO = ("regions", "one"), ("regions", "two")


def _going(agent: FakeAgent, *starts: tuple[int, int]) -> Runs:
    runs = Runs(agent)  # type: ignore[arg-type]
    for handle, bucket in starts:
        runs.start(handle, bucket)
    while runs.advance():
        pass
    return runs


def test_what_waits_for_a_bucket_holds_up_neither_other_peers_nor_other_reads() -> None:
    agent = FakeAgent([ONE, TWO, ONE, ONE])
    agent.filled[TWO] = 1
    runs = _going(agent, (0, 1), (1, 1), (2, 0), (3, 2))
    assert agent.posted == [1, 2]
    agent.filled[ONE] = 2
    while runs.advance():
        pass
    assert agent.posted == [1, 2, 0, 3]


def test_transfers_are_given_back_in_the_order_in_which_they_were_started() -> None:
    agent = FakeAgent([ONE, TWO])
    runs = _going(agent, (0, 0), (1, 0))
    agent.ended = {1}
    runs.advance()
    assert not runs.take()
    agent.ended = {0, 1}
    runs.advance()
    assert [runs.take(), runs.take(), runs.take()] == [True, True, False]


def test_a_bucket_is_told_as_read_only_when_those_before_it_were() -> None:
    agent = FakeAgent([ONE, ONE, TWO])
    agent.filled = {ONE: 5, TWO: 5}
    runs = _going(agent, (0, 4), (1, 5), (2, 1))
    agent.ended = {1, 2}
    runs.advance()
    assert agent.read == {TWO: 1}
    agent.ended.add(0)
    runs.advance()
    assert agent.read == {ONE: 5, TWO: 1}


def test_the_last_transfer_ends_when_peers_know_of_it() -> None:
    agent = FakeAgent([ONE])
    agent.filled[ONE], agent.told = 1, False
    runs = _going(agent, (0, 1))
    agent.ended = {0}
    runs.advance()
    assert not runs.take()
    agent.told = True
    assert runs.take()


def test_the_peer_that_failed_is_known_though_another_one_comes_first() -> None:
    agent = FakeAgent([ONE, TWO])
    runs = _going(agent, (0, 0), (1, 0))
    agent.lost = {"two"}
    with pytest.raises(ConnectionError):
        runs.advance()
    assert runs.peer == "two"
