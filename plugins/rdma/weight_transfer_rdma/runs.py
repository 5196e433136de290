"""Transfers of one agent that are under way side by side, with one peer or several."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs

from weight_transfer_rdma.nixl import Channel

if TYPE_CHECKING:
    from weight_transfer_rdma.nixl import Agent

FIRST_PAUSE = 2e-5
"""Seconds between two looks at transfers, at first."""


class Runs:
    """Begins transfers in the order of `start`, as far as they may begin, and gives them back in that order.

    One for which a bucket must have been filled waits for that, and those of the same plan and peer that follow it,
    too, if they need buckets; others go on.

    Attributes:
        peer: the agent with which the last call had to do, also if it raised.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._runs: deque[_Run] = deque()
        self.peer = ""

    def __len__(self) -> int:
        return len(self._runs)

    def start(self, handle: int, bucket: int) -> None:
        """Add a transfer, and the number of buckets that its peer must have filled before."""
        self._runs.append(_Run(handle, bucket, self._agent.channel(handle)))

    def advance(self) -> bool:
        """Look at all transfers, then begin the next one that may begin; return whether anything went on."""
        ended = [run for run in self._runs if run.posted and not run.ended and self._has_ended(run)]
        self._tell()
        return self._post_one() or bool(ended)

    def take(self) -> bool:
        """Forget the first transfer, if it has ended, and say so; the last one only when its peers know."""
        if not self._runs or not self._runs[0].ended or not (len(self._runs) > 1 or self._agent.has_told()):
            return False
        self._runs.popleft()
        return True

    def _has_ended(self, run: _Run) -> bool:
        self.peer = run.channel[1]
        run.ended = self._agent.done(run.handle)
        return run.ended

    def _post_one(self) -> bool:
        waiting: set[Channel] = set()
        for run in self._runs:
            if run.posted or (run.bucket and run.channel in waiting):
                continue
            self.peer = run.channel[1]
            if run.bucket and not self._agent.is_filled(run.channel, run.bucket):
                waiting.add(run.channel)
                continue
            self._agent.post(run.handle)
            run.posted = True
            self._has_ended(run)
            self._tell()
            return True
        return False

    def _tell(self) -> None:
        """Tell peers how many of their buckets were read, without a gap."""
        unread: set[Channel] = set()
        for run in self._runs:
            if run.bucket and run.channel not in unread:
                if not run.ended:
                    unread.add(run.channel)
                elif not run.told:
                    self._agent.note_read(run.channel, run.bucket)
                    run.told = True
        self._agent.has_told()


@attrs.define(eq=False)
class _Run:
    """A transfer, the bucket that it waits for, and how far it is."""

    handle: int
    bucket: int
    channel: Channel
    posted: bool = False
    ended: bool = False
    told: bool = False
