"""Rank 0's plan of what goes by region, of one target: made once, kept while ranks and workers stay as they are."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError
from weight_transfer.model.manifest import Manifest
from weight_transfer.plan.layout import NONE, Layout, Regions
from weight_transfer.plan.merging import merged_manifest
from weight_transfer.plan.pieces import plan_pieces
from weight_transfer.session.sharing import Keeper, Sharing, layout_for

if TYPE_CHECKING:
    from weight_transfer.plan.exchange import OutgoingRegions
    from weight_transfer.session.part import Part

_NOTHING = Manifest(())


class RegionPlan:
    """Who gives what to whom, by region.

    Attributes:
        id: another one for each plan; empty before the first. The other ranks tell which one they know.
        reason: why weights that lie on several ranks go whole, if some do.
        manifest: of all weights, whichever way they go.
        layout: of those that go by region; None if none do.
        wire: the layout for the workers; the same object while it is unchanged.
        kept: digest of what each worker keeps, by its number.
    """

    def __init__(self) -> None:
        self.id = ""
        self.reason = ""
        self.manifest = _NOTHING
        self.layout: Layout | None = None
        self.wire: dict[str, Any] | None = None
        self.kept: tuple[str, ...] | None = None
        self._sharing = Sharing(0)
        self._listed: dict[int, Manifest] = {}
        self._held: dict[int, tuple[str, Manifest, Regions]] = {}
        self._wires: dict[int, Any] = {}
        self._manifests: list[Manifest] = []
        self._ranks: list[Regions] | None = None
        self._keepers: list[Keeper] = []
        self._shares: tuple[dict[str, Any], ...] = ()

    def refresh(self, part: Part, readies: Sequence[dict[str, Any]], ask: Callable[[Manifest], list[Keeper]]) -> bool:
        """Take what the ranks say; return whether the plan has changed.

        Args:
            part: rank 0's.
            readies: what the others said, in order.
            ask: returns what the workers keep of the weights of a manifest.

        Raises:
            ManifestMismatchError: ranks disagree, or their shards leave a gap.
            ConfigError: weights that no rank has whole cannot go by region.
        """
        manifests = [part.manifest, *(self._manifest(rank, ready, part) for rank, ready in enumerate(readies, 1))]
        if not _same(manifests, self._manifests):
            self.manifest, self._manifests = merged_manifest(manifests), manifests
        ranks = self._regions(part, readies)
        keepers = ask(self.manifest) if ranks is not None else []
        known = self._ranks is not None if ranks is not None else self._ranks is None
        if self.id and known and _same(ranks or [], self._ranks or []) and _same(keepers, self._keepers):
            return False
        self.layout = layout_for(ranks, keepers) if ranks else None
        self.reason = self._reason(part, ranks, keepers)
        self._require_whole(part)
        self.wire = self.layout.to_wire() if self.layout is not None else None
        self.kept = _digests(keepers) if self.layout is not None else None
        self._ranks, self._keepers, self._shares = ranks, keepers, ()
        self._sharing.plan(self.layout, keepers)
        self.id = secrets.token_hex(4)
        return True

    def outgoing(self, part: Part) -> OutgoingRegions | None:
        """Return what rank 0 gives by region; None if nothing goes that way."""
        return self._sharing.outgoing(part.shards)

    def digests(self, outgoing: OutgoingRegions) -> dict[str, str]:
        """Return the digests of what rank 0 gives by region; see `Sharing.digests`."""
        return self._sharing.digests(outgoing)

    def names_of(self, worker: int, rank: int, numbers: Sequence[int]) -> list[str]:
        """Return the names of the weights that some pieces are of, which a worker takes of a rank."""
        keeper = next(keeper for keeper in self._keepers if keeper.worker == worker)
        assert self.layout is not None and keeper.kept is not None
        pieces = plan_pieces(self.layout, keeper.kept, worker).of_rank(rank)
        return [self.layout.manifest.params[number].name for number in pieces.param[list(numbers)].tolist()]

    def shares(self, said: Sequence[dict[str, Any] | None]) -> tuple[dict[str, Any], ...]:
        """Put together what the ranks' engines say; None stands for what a rank said last.

        Returns:
            JSON-safe, by rank; the same object while nothing changed.
        """
        before = self._shares or ({},) * len(said)
        now = tuple(old if new is None else new for new, old in zip(said, before, strict=True))
        if len(self._shares) != len(now) or not all(map(operator.is_, now, self._shares)):
            self._shares = now
        return self._shares

    def to_wire(self) -> dict[str, Any]:
        """Return what another rank must know of the plan, JSON-safe."""
        by_region = self.layout is not None
        return {
            "id": self.id,
            "manifest": self.manifest.to_wire() if by_region else None,
            "layout": self.wire,
            "keepers": [keeper.to_wire() for keeper in self._keepers] if by_region else [],
        }

    def _manifest(self, rank: int, ready: dict[str, Any], part: Part) -> Manifest:
        """Return the manifest of another rank: rank 0's, unless it lists something else."""
        said = ready["manifest"]
        if said is None:
            return part.manifest
        known = self._listed.get(rank)
        if known is None or known.digest != said["digest"]:
            self._listed[rank] = known = Manifest.from_wire(said["value"])
        return known

    def _regions(self, part: Part, readies: Sequence[dict[str, Any]]) -> list[Regions] | None:
        """Return what each rank holds, as regions of the common manifest; None if nothing may go by region."""
        said = [ready["regions"] for ready in readies]
        if part.regions is None or None in said:
            return None
        held = []
        for rank, manifest in enumerate(self._manifests):
            known = self._held.get(rank)
            digest = part.regions.digest if not rank else said[rank - 1]["digest"]
            if (
                known is None
                or known[0] != digest
                or known[1] is not manifest
                or known[2].manifest is not self.manifest
            ):
                own = part.regions if not rank else self._said(rank, said[rank - 1], manifest)
                self._held[rank] = known = digest, manifest, own.in_manifest(self.manifest)
            held.append(known[2])
        return held

    def _said(self, rank: int, said: dict[str, Any], manifest: Manifest) -> Regions:
        if "value" in said:
            self._wires[rank] = said["value"]
        return Regions.from_wire(self._wires[rank], manifest)

    def _reason(self, part: Part, ranks: Sequence[Regions] | None, keepers: Sequence[Keeper]) -> str:
        """Say why what lies on several ranks is gathered; the first reason that holds."""
        if ranks is None:
            return "the backend does not move regions"
        whole = self.manifest if self.layout is None else self.layout.whole
        for param in whole.params:
            number = self.manifest.numbers[param.name]
            lacking = next((it for it in keepers if it.kept is None or it.kept.pattern_of[number] == NONE), None)
            if lacking is not None:
                return f"worker {lacking.peer} has no target for {param.name!r}"
            if all(held.pattern_of[number] == NONE for held in ranks):
                return f"{param.name!r} cannot be sent by region"
        return ""

    def _require_whole(self, part: Part) -> None:
        """Raise if something has to go whole that rank 0 cannot put together."""
        whole = self.manifest if self.layout is None else self.layout.whole
        lacking = [param for param in whole.params if param.name not in part.manifest.by_name]
        if lacking or (whole.params and len(self._manifests) > 1 and not part.source.whole):
            name = (lacking or whole.params)[0].name
            raise ConfigError(
                f"{name!r} lies on several trainer ranks that cannot gather it, so it must go by region: that needs "
                "a backend that moves regions (ipc, nccl, rdma), and workers that have targets."
            )


def _digests(keepers: Sequence[Keeper]) -> tuple[str, ...]:
    """Return the digest of what each worker keeps, by its number; workers that are not joined have an empty one."""
    found = {keeper.worker: keeper.kept.digest for keeper in keepers if keeper.kept is not None}
    return tuple(found.get(worker, "") for worker in range(max(found, default=-1) + 1))


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
