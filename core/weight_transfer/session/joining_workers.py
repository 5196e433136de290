"""How the sender's workers join the engine's group, and leave it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from weight_transfer.config.settings import RECEIVER
from weight_transfer.config.structuring import structure, unstructure
from weight_transfer.errors import ConfigError, WeightTransferError
from weight_transfer.model.dtypes import dtypes_by_name
from weight_transfer.session.called_workers import CalledWorkers
from weight_transfer.session.comparing import incomparable
from weight_transfer.session.greeting import Greeting, require_distinct
from weight_transfer.session.peers import Peer, make_peer, make_slots
from weight_transfer.session.waiting import logged_wait
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.control import ControlChannel
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.calls import Lost
    from weight_transfer.session.crew import Crew
    from weight_transfer.values.lease import Lease

_PATIENCE = 1.0  # seconds that a worker's earlier call may still take if the others need not wait for it

_ASKED: dict[str, object] = {
    "report_dtypes": None,
    "session": None,
    "trainer_ranks": 1,
    "ranks": [],
    "text_versions": False,
    "lease": None,
}
"""Keys of the init info that are left out unless they say something else: other systems' workers do not know them."""


def _says_nothing(key: str, value: object) -> bool:
    return key in _ASKED and (value == _ASKED[key] or not value)


class JoiningWorkers(CalledWorkers):
    """Workers that come and go, and the trainer's engine that they join."""

    def __init__(
        self,
        backend: LoadedBackend,
        config: WeightTransferConfig,
        parallel_config: ParallelConfig,
    ) -> None:
        super().__init__(backend, config, parallel_config)
        self._numbers = itertools.count()
        self._report_dtypes = {}
        if RECEIVER in config.cast.values():
            self._report_dtypes["report_dtypes"] = "checkpoint" if config.is_checkpoint_format else "kernel"

    def add(self, worker: str | ControlChannel, count: int) -> None:
        """Take in a control channel with ``count`` workers behind it; they join before the next update."""
        peer = make_peer(worker, next(self._numbers), count, self._config)
        peer.added = self.tenure.lease is not None
        for other in self.peers:
            if peer.address == other.address or peer.channel is other.channel:
                peer.close()
                raise ConfigError(f"Worker {other.address} is there already; name each worker once.")
        self.peers.append(peer)

    def remove(self, worker: str | ControlChannel) -> None:
        """Let go of a control channel. Ranks move up, so the others join a new group."""
        found = [peer for peer in self.peers if worker is peer.channel or peer.is_at(worker)]
        if not found:
            known = ", ".join(peer.address for peer in self.peers)
            raise ConfigError(f"There is no worker {worker}; there are {known}.")
        if len(self.peers) == 1:
            raise ConfigError(f"Worker {found[0].address} is the last one; close the sender instead.")
        self.drop_engines()
        self.peers.remove(found[0])
        found[0].close()

    def serve_with(self, crew: Crew) -> None:
        """Have engines on these trainer ranks; if there were others, all workers join anew."""
        if not self.engines.serve_with(crew):
            self.drop_engines()

    def require_generation(self, generations: Sequence[str | None]) -> None:
        """Join all workers anew if another trainer rank has lost its engine: another process has taken its place."""
        if not self.engines.are_those_of(generations):
            self.drop_engines()

    def place(self, device: str) -> None:
        """Have engines for weights on a torch device; if they have moved, all workers join anew."""
        if not self.engines.place(device):
            self.drop_engines()

    def join(self) -> Lost:
        """Join the workers that are not joined; all of them, if the backend cannot take in a single one."""
        if all(peer.joined for peer in self.peers):
            return {}
        deadline = Deadline(self._config.init_timeout)
        lost = self.greet(deadline)
        lease = self._take_lease(deadline, lost)
        present = [peer for peer in self.peers if peer not in lost]
        if not self._rejoins:
            self.drop_engines()
        joining = [peer for peer in present if not peer.joined]
        if not joining:
            return lost
        slots = make_slots(self.peers if self._rejoins else present)
        fields = self.engines.open([slots[peer] for peer in joining], deadline)
        assert self.engines.own is not None
        kind = self.engines.own.init_info_cls
        infos: dict[Peer, dict[str, Any]] = {}
        for peer, own in zip(joining, fields, strict=True):
            slot = slots[peer]
            peer.first_worker = slot.rank_offset - 1
            common: dict[str, Any] = {"rank_offset": slot.rank_offset, "world_size": slot.world_size}
            common |= {"timeout": max(deadline.remaining(), 1e-3), "text_versions": peer.text_versions}
            info = structure({**own, **common, **self._report_dtypes}, kind, "init_info")
            infos[peer] = {key: value for key, value in unstructure(info).items() if not _says_nothing(key, value)}
        session = self.tenure.next_session()
        method = "init_weight_transfer_engine"
        calls = self.call(joining, lambda peer: peer.join(infos[peer], session, lease), method, deadline, self.react)
        self.require_going_on()
        try:
            with logged_wait(lambda: f"waiting for {calls.silent or 'the engine'} in phase init"):
                self.engines.join(deadline)
        except WeightTransferError as error:
            cause = calls.explain(error)
            if not (calls.failures and self.goes_on):
                if cause is error:
                    raise
                raise cause from error
        failures = calls.wait(deadline)
        if self._config.verify != "none":
            refused = self.refuse({peer: incomparable(peer, own) for peer, own in calls.results.items()}, deadline)
            if refused and not self.goes_on:  # they have joined the engine, which does not work without them
                raise next(iter(refused.values()))
            failures |= refused
        lost |= self.settle(failures)
        for peer in joining:
            peer.joined = peer not in lost
            peer.dtypes = dtypes_by_name(calls.results.get(peer), peer.address)
            if peer.joined:
                self._tell(peer, None)
        return lost

    def _take_lease(self, deadline: Deadline, lost: Lost) -> Lease:
        """Return this trainer's lease; if a worker was added that a newer one has used, all join under a new lease."""
        anew = self.tenure.ends_for(self.peers)
        if anew:
            self.drop_engines()
            lost |= self.greet(deadline)
        return self.tenure.take(self.peers, anew)

    def connect(self) -> None:
        """Join all workers, or leave none half joined."""
        try:
            self.require_one(self.join())
        except BaseException as error:
            self.abort(str(error) or type(error).__name__)
            cause = self.tenure.cause(error)
            if cause is error:
                raise
            raise cause from error

    def greet(self, deadline: Deadline) -> Lost:
        """Wait until the workers answer that have not, and learn from their status what they are.

        Raises:
            ReplacedError: another trainer has taken a worker over.
        """
        self.tenure.require()
        strangers = [peer for peer in self.peers if not (peer.joined or peer.greeted)]
        busy = all(peer.turns.busy for peer in self.peers)
        patience = Deadline(_PATIENCE) if self._may_lose and not busy else deadline
        greeting = Greeting(self._config.backend, deadline, self._may_ask_again)
        asked = self.call([peer for peer in strangers if peer.submits], Peer.ask_status, "status", patience)
        failures = greeting.take(asked.wait(deadline), asked.results)
        waiting = [peer for peer in strangers if not (peer.greeted or peer in failures)]
        failures |= greeting.explained(self.call(waiting, greeting, "status", patience, blocks=True).wait(deadline))
        lost = self.settle(failures)
        require_distinct(self.peers)
        return lost

    def _may_ask_again(self) -> bool:
        """Whether a worker that is not up is waited for; with ``"continue"``, only as long as no other one answers."""
        others = self._may_lose and any(peer.joined or peer.greeted for peer in self.peers)
        return not others and self.failed is None
