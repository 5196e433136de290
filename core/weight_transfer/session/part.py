"""One trainer rank's part in an update: its weights as they are now, and what the ranks compare before they begin."""

from __future__ import annotations

from typing import Any

import attrs

from weight_transfer.config.settings import WeightTransferConfig
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.selection import SelectedSource
from weight_transfer.model.source import ModuleSource, WeightSource
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.session.guarded import named
from weight_transfer.session.meeting import name_of
from weight_transfer.session.rank_shards import RankShards
from weight_transfer.values.events import Version

_SHARED = ("backend", "cast", "verify", "is_checkpoint_format", "bucket_bytes", "buckets")
"""Configuration that all ranks must have alike."""


class StartOver(Exception):  # noqa: N818  (the update may still succeed)
    """All trainer ranks have to begin this update anew: one of them has other weights than it thought, say."""


@attrs.define(eq=False)
class Part:
    """What this rank sends.

    Attributes:
        config: the trainer's.
        target: which of the receivers' models it is for.
        version: that ``send`` was given; None if it was given none.
        only: patterns of names, if some of the weights are sent.
        allow_rollback: whether the version may be lower than what the workers have published.
        read: the manifest of the weights before any cast.
        source: what is sent, cast.
        manifest: of ``source``.
        shards: this rank's.
        regions: what it holds; None if nothing may go by region.
        recalled: the source that speaks of what it has read before, if it does; see `ModuleSource.recall`.
    """

    config: WeightTransferConfig
    target: str
    version: Version | None
    only: tuple[str, ...] | None
    allow_rollback: bool
    read: Manifest
    source: WeightSource
    manifest: Manifest
    shards: RankShards
    regions: Regions | None
    recalled: ModuleSource | None
    _whole: tuple[Layout, WeightSource] | None = None

    @property
    def device(self) -> str:
        """Where the weights lie."""
        return self.source.device

    def is_unmoved(self) -> bool:
        """Return whether the weights lie where the source has said, if that was not looked at before it said so."""
        return self.recalled is None or self.recalled.is_unmoved()

    def look_on(self) -> bool:
        """Do a part of what `confirm` does, while bytes move; return whether all is done, and right."""
        return self.recalled is None or self.recalled.look_on()

    def confirm(self) -> bool:
        """Return whether what the source has said is right: while bytes move, and before they count."""
        return self.recalled is None or self.recalled.confirm()

    @property
    def call(self) -> dict[str, Any]:
        """What all ranks must have said alike, JSON-safe."""
        shared = {name: getattr(self.config, name) for name in _SHARED}
        only = list(self.only) if self.only is not None else None
        asked = {"version": self.version, "target": self.target, "only": only, "allow_rollback": self.allow_rollback}
        return asked | shared

    def whole(self, layout: Layout | None) -> WeightSource:
        """Return what does not go by region; the same object for the same layout."""
        if layout is None:
            return self.source
        if self._whole is None or self._whole[0] is not layout:
            if layout.manifest is self.manifest:
                part = layout.whole
            else:
                names = layout.whole.by_name
                part = Manifest((param for param in self.manifest.params if param.name in names), partial=True)
            self._whole = layout, SelectedSource(self.source, part)
        return self._whole[1]

    def ready(self, told: dict[str, object]) -> dict[str, Any]:
        """Return what rank 0 must know, without what it was ``told`` before; that is taken down there."""
        message: dict[str, Any] = {"call": self.call, "read": self.read.digest, "whole": self.source.whole}
        values = {"manifest": self.manifest if not self.source.whole else None, "regions": self.regions}
        for name, value in values.items():
            key = f"{name} {self.target}"
            if value is None:
                message[name] = None
                continue
            message[name] = {"digest": value.digest}
            if told.get(key) != value.digest:
                message[name]["value"] = value.to_wire()
                told[key] = value.digest
        return message

    def named(self, error: BaseException) -> BaseException:
        """Give an error of this rank its place in the tree."""
        return named(error, self.config.backend, self.version)


def require_alike(mine: Part, theirs: dict[str, Any], rank: int) -> None:
    """Raise unless another rank was called like this one, with the same model.

    Raises:
        ManifestMismatchError: it names the rank and what differs.
    """
    call = theirs.get("call")
    own = mine.call
    if not isinstance(call, dict) or call.keys() != own.keys():
        raise ManifestMismatchError(
            f"{name_of(rank)} speaks another version of weight-transfer; install one on all ranks.", peer=name_of(rank)
        )
    for key, value in own.items():
        if call[key] != value:
            raise ManifestMismatchError(
                f"{name_of(rank)} called send with {key} = {call[key]!r}, rank 0 with {value!r}; all ranks must be "
                "called and configured alike.",
                peer=name_of(rank),
                phase="update",
            )
    if theirs.get("whole") and mine.source.whole and theirs.get("read") != mine.read.digest:
        raise ManifestMismatchError(
            f"{name_of(rank)} called send with another model than rank 0: other names, shapes or dtypes of weights.",
            peer=name_of(rank),
            phase="update",
        )
