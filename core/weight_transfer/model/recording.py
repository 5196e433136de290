"""What a model's loader does with a checkpoint, as values: which elements of which source land where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from weight_transfer.model.manifest import Manifest, digest_json
from weight_transfer.model.regions import Region
from weight_transfer.model.strided import Strided, walks_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_DIMS = 3
"""Dimensions that a recorded copy or fill has at most."""

FAILS = "the loader fails at it: "
"""Begins the reason why a source has failed, if it is an exception that is not about its missing bytes."""

TItem = TypeVar("TItem", bound="RecordedCopy | RecordedFill")


@attrs.frozen
class TargetForm:
    """What a target looked like when it was recorded; what is recorded fits tensors of this form only.

    Attributes:
        dtype: as text, such as ``"bfloat16"``.
        shape: its own.
        stride: in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def strided(self) -> Strided:
        """All of its elements."""
        return Strided(0, self.shape, self.stride)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with strides {list(self.stride)}"


@attrs.frozen
class RecordedCopy:
    """Elements of a source that a loader copies into a target.

    Attributes:
        target: its name.
        to: where, in the target; at most `MAX_DIMS` dimensions.
        source: the name under which the weight travels.
        frm: from where, in the contiguous source; of the same shape.
        casts: whether the copy converts from the source's dtype to the target's, in one step.
    """

    target: str
    to: Strided
    source: str
    frm: Strided
    casts: bool

    def views(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the view of ``target`` that is written, and that of ``source`` that is read.

        Raises:
            ValueError: the source is not contiguous.
        """
        if not source.is_contiguous():
            raise ValueError(f"{self.source!r} must be contiguous, but has strides {list(source.stride())}")
        return self.to.on(target), self.frm.on(source)


@attrs.frozen
class RecordedFill:
    """Elements of a target that a loader sets to one value, such as padding.

    Attributes:
        target: its name.
        to: where, in the target; at most `MAX_DIMS` dimensions.
        value: as given to ``fill_``.
    """

    target: str
    to: Strided
    value: bool | int | float


@attrs.frozen
class Refusal:
    """A target that no copy can fill, so that the model's own loader has to.

    Attributes:
        target: its name.
        sources: all that the loader needs for it, as far as that was seen, by name; sorted.
        reason: what the loader does, as half a sentence.
    """

    target: str
    sources: tuple[str, ...]
    reason: str


@attrs.frozen(slots=False, eq=False)
class Recording:
    """What one run of a model's loader would do, for one manifest and targets of certain forms.

    Attributes:
        manifest: of the sources.
        targets: form of each target, by name.
        copies: in the loader's order; none writes what another one or a fill writes.
        fills: in the loader's order.
        refused: by target; none of the copies and fills is one of theirs.
        failed: of each source that has to be given to the loader itself, why: it looks into the bytes, for one.
        unused: sources that this worker does not need at all: another rank's expert, or what is tied here.
        uncovered: of each target that copies and fills leave gaps in: elements written, and elements that it has.
    """

    manifest: Manifest
    targets: Mapping[str, TargetForm]
    copies: tuple[RecordedCopy, ...]
    fills: tuple[RecordedFill, ...]
    refused: Mapping[str, Refusal]
    failed: Mapping[str, str]
    unused: frozenset[str]
    uncovered: Mapping[str, tuple[int, int]]

    @cached_property
    def digest(self) -> str:
        """128 bits of SHA-256 over all of it, as 32 hexadecimal digits; the same for the same loader, anywhere."""
        return digest_json(self.to_wire())

    @cached_property
    def by_source(self) -> Mapping[str, Sequence[RecordedCopy]]:
        """The copies from each source, in order."""
        return _grouped((copy.source, copy) for copy in self.copies)

    @cached_property
    def by_target(self) -> Mapping[str, Sequence[RecordedCopy]]:
        """The copies into each target, in order."""
        return _grouped((copy.target, copy) for copy in self.copies)

    @cached_property
    def fills_by_target(self) -> Mapping[str, Sequence[RecordedFill]]:
        """The fills of each target, in order."""
        return _grouped((fill.target, fill) for fill in self.fills)

    @cached_property
    def for_loader(self) -> frozenset[str]:
        """Sources that the model's own loader needs whole: those that failed, and those of refused targets."""
        return frozenset(self.failed).union(*(refusal.sources for refusal in self.refused.values()))

    def boxes(self, source: str) -> list[tuple[Region, str, Strided]] | None:
        """Return what is kept of a source as boxes of it, and where each belongs.

        Returns:
            The box, the target's name, and the view of the target, of the box's shape. Empty if nothing is kept. None
            if the source is needed whole: a copy reads something else than a box, casts, or the loader needs it.
        """
        if source in self.for_loader:
            return None
        whole = Strided.contiguous(self.manifest.by_name[source].shape)
        boxes = [_box_of(copy, whole) for copy in self.by_source.get(source, ())]
        found = [box for box in boxes if box is not None]
        return found if len(found) == len(boxes) else None

    def extents(self, source: str) -> list[tuple[int, int]] | None:
        """Return, for each dimension of a source, where what is kept begins, and how many indices it takes.

        Returns:
            None if something else than boxes is read, or if nothing is kept.
        """
        whole = Strided.contiguous(self.manifest.by_name[source].shape)
        boxes = [_box_of(attrs.evolve(copy, casts=False), whole) for copy in self.by_source.get(source, ())]
        regions = [box[0] for box in boxes if box is not None]
        if not regions or len(regions) < len(boxes):
            return None
        found = []
        for dim in range(len(whole.shape)):
            parts = {(region.offset[dim], region.shape[dim]) for region in regions}
            found.append((min(start for start, _ in parts), sum(count for _, count in parts)))
        return found

    def replay(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Do all copies and fills one by one: simple, and slow; what is refused or failed is left out.

        Args:
            sources: contiguous tensors by name; those without a copy may be absent.
            targets: tensors of the recorded forms.
        """
        import torch

        with torch.no_grad():
            for copy in self.copies:
                to, frm = copy.views(sources[copy.source], targets[copy.target])
                to.copy_(frm)
            for fill in self.fills:
                fill.to.on(targets[fill.target]).fill_(fill.value)

    def to_wire(self) -> dict[str, Any]:
        """Return it as JSON-safe data, the manifest as its digest."""
        from weight_transfer.model.recording_wire import recording_to_wire

        return recording_to_wire(self)

    @classmethod
    def from_wire(cls, data: Any, manifest: Manifest) -> Recording:
        """Build a recording from `to_wire`.

        Args:
            data: as it came out of JSON.
            manifest: the one that was recorded.

        Raises:
            ManifestMismatchError: it is of another manifest.
            ConfigError: the data is malformed, or says something that cannot be of this manifest.
        """
        from weight_transfer.model.recording_wire import recording_from_wire

        return recording_from_wire(data, manifest)


def _grouped(rows: Iterable[tuple[str, TItem]]) -> dict[str, list[TItem]]:
    found: defaultdict[str, list[TItem]] = defaultdict(list)
    for key, value in rows:
        found[key].append(value)
    return dict(found)


def _box_of(copy: RecordedCopy, whole: Strided) -> tuple[Region, str, Strided] | None:
    walks = None if copy.casts else walks_of(copy.frm, whole, copy.to)
    joined = walks.per_axis() if walks is not None else None
    if walks is None or joined is None or any(walk.step != 1 and walk.size > 1 for walk in joined):
        return None
    shape = tuple(walk.size for walk in joined)
    stride = tuple(walk.other for walk in joined)
    return Region(walks.start, shape), copy.target, Strided(copy.to.offset, shape, stride)
