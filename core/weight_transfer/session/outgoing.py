"""What a sender keeps from update to update of one target: its version, and the sources that it was sent from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_transfer.control.message import Message
from weight_transfer.errors import ConfigError
from weight_transfer.memory.place import place_of
from weight_transfer.model.casting import CastSource
from weight_transfer.model.info import WireEncoder
from weight_transfer.model.partial import PartialSource
from weight_transfer.model.source import ModuleSource, WeightSource, as_source
from weight_transfer.session.rank_shards import RankShards
from weight_transfer.session.sent import Residents

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.session.peers import Peer
    from weight_transfer.values.events import Version

MANY = 200
"""Weights: fewer are looked at in less time than it takes to tell somebody of them."""


class Outgoing:
    """One target's side in the trainer.

    Sources remember their manifests, so the methods return the same object for the same arguments.

    Attributes:
        target: its name.
        version: the last one that was sent; None before the first.
        params: how many weights it had.
        blindly: whether the next update may begin before anybody has looked where the weights lie.
        update: the id of its weights.
        encoder: of its update infos.
        residents: what is known of the places of its weights, for their digests.
        recalled: the source, if it speaks of what it has read before: that is to be confirmed.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.version: Version | None = None
        self.params = 0
        self.blindly = False
        self.update: str | None = None
        self.encoder = WireEncoder()
        self.residents = Residents()
        self._module: ModuleSource | None = None
        self._cast: CastSource | None = None
        self._uncast: WeightSource | None = None
        self._part: PartialSource | None = None
        self.recalled: ModuleSource | None = None
        self._shards: RankShards | None = None

    def whole(self, weights: nn.Module | WeightSource) -> WeightSource:
        """Return all of the weights as a source.

        Raises:
            ConfigError: they are neither a module nor a source.
        """
        if self._module is None or self._module.module is not weights:
            source = as_source(weights)
            if source is weights or not isinstance(source, ModuleSource):
                return source
            self._module = source
        return self._module

    @contextmanager
    def recalling(self, source: WeightSource, whole: bool) -> Iterator[None]:
        """Let a source of many weights speak of what it has read before, inside of a ``with`` block; see `recalled`.

        Args:
            source: the source.
            whole: whether all of its weights are sent.
        """
        recalls = whole and self.params >= MANY  # a part that is given up could not be sent anew
        module = source if recalls and type(source) is ModuleSource else None
        if module is None:
            yield
            return
        module.recall(True, blindly=self.blindly)
        self.recalled = module
        try:
            yield
        finally:
            self.recalled = None
            module.recall(False)

    def cast(self, source: WeightSource, *chosen: Callable[[Manifest], Mapping[str, str]]) -> WeightSource:
        """Return a source whose weights are cast to the dtypes that are ``chosen``, one choice after the other."""
        if self._cast is None or self._uncast is not source:
            cast: WeightSource = source
            for choose in chosen:  # what the workers have is known to one rank alone: it casts what is gathered
                cast = CastSource.choosing(cast, choose)
            assert isinstance(cast, CastSource)
            self._uncast, self._cast = source, cast
        return self._cast

    def forget_cast(self) -> None:
        """Choose dtypes anew next time."""
        self._cast = None

    def forget(self) -> None:
        """Let go of all sources, and thereby of the weights."""
        self.encoder, self.residents = WireEncoder(), Residents()
        self._module = self._cast = self._uncast = self._part = self.recalled = self._shards = None

    def messages(self, info: WeightTransferUpdateInfo, peers: Sequence[Peer]) -> dict[Peer, Message]:
        """Return what each worker is told of an update: one object for all that know the same and joined together."""
        made: dict[object, Message] = {}
        messages = {}
        for peer in peers:
            known = peer.known.get(self.target, {})
            key = (peer.session, *sorted(known.items()))
            if key not in made:
                session = {} if peer.session is None else {"session": peer.session}
                made[key] = Message(self.encoder.encode(info, known) | session)
            messages[peer] = made[key]
        return messages

    def remember(self, info: WeightTransferUpdateInfo, peers: Sequence[Peer], failures: Collection[Peer]) -> None:
        """Take down what workers know since an update; those that failed know nothing."""
        digests = self.encoder.digests(info)
        for peer in peers:
            peer.known[self.target] = {} if peer in failures else dict(digests)

    def part(self, source: WeightSource, only: Sequence[str] | None) -> WeightSource:
        """Return the part that matches ``only``; all of the source if that is None.

        Raises:
            ConfigError: ``only`` is no list of patterns.
        """
        if only is None:
            return source
        if self._part is None or self._part.source is not source or self._part.only != tuple(only):
            self._part = PartialSource(source, only)
        return self._part

    def shards(self, rank: int, device: str) -> RankShards:
        """Return the shards of this trainer rank, whose memory lies on a torch device."""
        place = place_of(device)
        if self._shards is None or (self._shards.rank, self._shards.place) != (rank, place):
            self._shards = RankShards(rank, place)
        return self._shards

    def require_base(self, manifest: Manifest) -> None:
        """Raise if these are some of the weights, and nothing was sent whole yet."""
        if manifest.partial and self.version is None:
            raise ConfigError(
                "The workers need all weights before they can be sent some: send all of them first, without only."
            )
