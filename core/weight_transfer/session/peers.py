"""The sender's view of its workers: who they are, what they know, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.control.channel import ControlChannel, takes_session, takes_update
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import ConfigError, HandshakeError
from weight_transfer.model.manifest import Manifest
from weight_transfer.plan.layout import Regions
from weight_transfer.session.sharing import Keeper
from weight_transfer.session.turns import Turns
from weight_transfer.values.events import Version
from weight_transfer.values.lease import Lease

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.control.message import Message
    from weight_transfer.session.inbox import Wire

_METHODS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
_NAMED = ("session", "update")  # arguments that a channel's methods have under these names, wherever they stand


@attrs.define(eq=False)
class Peer:
    """One control channel and the workers behind it.

    Attributes:
        address: its URL, or ``worker 0`` for a channel without one.
        channel: the channel.
        count: workers behind it.
        owned: whether the sender made the channel, and closes it.
        added: whether they were added after the first join, and have not been greeted since.
        joined: whether they have joined the engine's current group.
        called: whether they were told of this trainer since they were last forgotten: then they must hear of an abort.
        started: whether an update is open on them.
        greeted: whether they have answered.
        status: what they answered; empty for a channel, or a server, without ``status``.
        committed: by target, the version that they had published last when they joined, until this trainer's is.
        session: by what they know this trainer, if the channel carries sessions.
        names_updates: whether they are told which update they are to publish.
        init_info: what they were sent to join.
        dtypes: of their weights by name, if they were asked and know.
        known: digest by field name of what they have been sent once, by target.
        first_worker: number of the first of them among all workers.
        kept: by target, the manifest of which they were asked what they keep, and what they answered.
        turns: of the calls to the channel.
    """

    address: str
    channel: ControlChannel
    count: int
    owned: bool = False
    added: bool = False
    joined: bool = False
    called: bool = False
    started: bool = False
    greeted: bool = False
    status: dict[str, Any] = attrs.field(factory=dict)
    committed: dict[str, Version] = attrs.field(factory=dict)
    session: str | None = None
    names_updates: bool = False
    init_info: dict[str, Any] = attrs.field(factory=dict)
    dtypes: dict[str, str] | None = None
    known: dict[str, dict[str, str]] = attrs.field(factory=dict)
    first_worker: int = 0
    kept: dict[str, tuple[Manifest, list[Keeper]]] = attrs.field(factory=dict)
    turns: Turns = attrs.field(factory=Turns)

    @property
    def ids(self) -> set[str]:
        """The receivers behind it, as far as they tell."""
        return {part for part in str(self.status.get("id") or "").split(",") if part}

    @property
    def text_versions(self) -> bool:
        """Whether the channel wants versions as text."""
        return getattr(self.channel, "text_versions", False) is True

    @property
    def submits(self) -> bool:
        """Whether calls to the channel need no thread that waits."""
        return getattr(self.channel, "submits", False) is True

    @property
    def wire(self) -> Wire | None:
        """The connection on which answers come, if whoever waits for them may read it."""
        wire: Wire | None = getattr(self.channel, "wire", None) if self.submits else None
        return wire

    @property
    def begins(self) -> bool:
        """Whether an update may begin on them with one call: they take it, and are surely those that have joined."""
        return self.joined and getattr(self.channel, "begins", False) is True

    def ask_status(self) -> object:
        """Ask how they are."""
        return self._call("status")

    def wait_for_status(self) -> object:
        """Return how they are, at once or after a while; an empty dict for a channel without ``status``."""
        status_of: Callable[[], object] | None = getattr(self.channel, "status", None)
        return status_of() if status_of is not None else {}

    @property
    def lease(self) -> Lease | None:
        """The newest that they have told of."""
        return Lease.told(self.status)

    def join(self, init_info: dict[str, Any], session: str, lease: Lease) -> object:
        """Have them join; from then on the session goes with each call, if the channel carries sessions."""
        self.session = session if takes_session(self.channel) else None
        knows_leases = self.session is not None and "lease" in self.status
        self.names_updates = knows_leases and takes_update(self.channel)
        self.called = True
        self.init_info = init_info | self._session | ({"lease": attrs.asdict(lease)} if knows_leases else {})
        return self._call("init_weight_transfer_engine", init_info=self.init_info)

    def needs(self, request: dict[str, Any], manifest: Manifest) -> object:
        """Ask what they keep of the weights of a manifest."""
        self.called = True
        target = request["target"]
        sent: dict[str, Any] = {"digest": manifest.digest}
        if self.known.get(target, {}).get("manifest") != manifest.digest:
            sent["value"] = manifest.to_wire()
        return self._call("weight_needs", request={**request, "manifest": sent} | self._session)

    def keep(self, target: str, manifest: Manifest, answer: object) -> None:
        """Take down what they keep; ``answer`` is None for a channel that cannot be asked.

        Raises:
            HandshakeError: the answer is none.
        """
        needs = answer.get("needs") if isinstance(answer, dict) else [None] * self.count
        if not isinstance(needs, list) or len(needs) != self.count:
            raise HandshakeError(
                f"It answered what it keeps for {len(needs) if isinstance(needs, list) else 'no'} workers, and has "
                f"{self.count} behind it.",
                peer=self.address,
                phase="init",
            )
        regions = [None if need is None else Regions.from_wire(need, manifest) for need in needs]
        keepers = [Keeper(self.address, self.first_worker + index, kept) for index, kept in enumerate(regions)]
        self.kept[target] = manifest, keepers
        if answer is not None:
            self.known.setdefault(target, {})["manifest"] = manifest.digest

    def expect(self) -> Future[None] | None:
        """Say that an update is about to start, if they take that; return what is done once that has been said."""
        expect = getattr(self.channel, "expect_weight_update", None)
        said = expect(**self._session) if self.joined and expect is not None else None
        return said if isinstance(said, Future) else None

    @property
    def takes_decisions(self) -> bool:
        """Whether a single worker can be told to publish an update before it has arrived."""
        return self.count == 1 and self.begins and self.names_updates and hasattr(self.channel, "decide_weight_update")

    def decide(self, update: str, digest: str) -> None:
        """Have them publish an update once it has arrived with a receipt of this digest."""
        self.channel.decide_weight_update(update=update, digest=digest, **self._session)  # type: ignore[attr-defined]

    def start(self) -> object:
        """Open an update."""
        self.called = True
        return self._call("start_weight_update", **self._session)

    def update(self, info: Message) -> object:
        """Have them receive; the session stands in ``info``."""
        return self._call("update_weights", update_info=info)

    def begin(self, info: Message) -> object:
        """Open an update and have them receive."""
        self.called = True
        return self._call("begin_weight_update", update_info=info)

    def finish(self, version: Version, update: str | None) -> object:
        """Have them publish a version, which an update has brought."""
        text = str(version) if self.text_versions else version
        named = {"update": update} if self.names_updates else {}
        return self._call("finish_weight_update", weight_version=text, **self._session, **named)

    def abort(self, reason: str) -> object:
        """Have them give up."""
        return self._call("abort_weight_update", reason=reason, **self._session)

    def _call(self, method: str, **arguments: Any) -> object:
        """Call a method of the channel; return what it returns, or a future of that."""
        if self.submits:
            future: Future[Any] = self.channel.submit(method, **arguments)  # type: ignore[attr-defined]
            return future
        call: Callable[..., object] = getattr(self.channel, method)
        named = {name: value for name, value in arguments.items() if name in _NAMED}
        return call(*(value for name, value in arguments.items() if name not in _NAMED), **named)

    @property
    def _session(self) -> dict[str, Any]:
        return {} if self.session is None else {"session": self.session}

    def is_at(self, worker: object) -> bool:
        """Whether ``worker`` is this one's address."""
        return isinstance(worker, str) and worker.rstrip("/") == self.address

    def close(self) -> None:
        """Close the channel if the sender made it."""
        close = getattr(self.channel, "close", None)
        if self.owned and close is not None:
            close()

    def forget(self) -> None:
        """They have to join anew."""
        self.joined = self.called = self.started = self.greeted = False
        self.known, self.kept = {}, {}


def make_peer(worker: str | ControlChannel, index: int, count: int, config: WeightTransferConfig) -> Peer:
    """Return the peer of a worker; a URL becomes an HTTP channel.

    Args:
        worker: a URL or a control channel.
        index: its number, the name of a channel without an address.
        count: workers behind it, unless its attribute ``workers`` says otherwise.
        config: token, certificates and timeouts of an HTTP channel.

    Raises:
        ConfigError: it is neither, or there is no worker behind it.
    """
    channel: ControlChannel
    if isinstance(worker, str):
        from weight_transfer.control.http_client import HttpChannel
        from weight_transfer.control.tls import Tls

        channel = HttpChannel(
            worker,
            token=config.token,
            timeout=config.timeout,
            status_timeout=min(config.timeout, config.init_timeout),
            connect_timeout=min(5.0, config.init_timeout / 2),
            tls=Tls.of(config),
        )
    elif all(callable(getattr(worker, method, None)) for method in _METHODS):
        channel = worker
    else:
        raise ConfigError(
            f"{worker!r} is no worker; give its URL, such as 'http://127.0.0.1:8001', a WeightReceiver, or a control "
            "channel."
        )
    address = getattr(channel, "address", None) or f"worker {index}"
    own = getattr(channel, "workers", None)
    if isinstance(own, int) and not isinstance(own, bool):  # else it is something of its own
        count = own
    if count < 1:
        raise ConfigError(
            f"{count} workers cannot be behind {address}; workers_per_channel, or its attribute workers, is 1 or more."
        )
    return Peer(str(address), channel, count, owned=channel is not worker)


def make_slots(peers: Sequence[Peer]) -> dict[Peer, WorkerSlot]:
    """Give each peer its place in a group of the trainer (rank 0) and these peers, in order."""
    world_size = 1 + sum(peer.count for peer in peers)
    slots, offset = {}, 1
    for peer in peers:
        slots[peer] = WorkerSlot(peer=peer.address, rank_offset=offset, count=peer.count, world_size=world_size)
        offset += peer.count
    return slots
