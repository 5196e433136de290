"""What memory that a loader has made holds: elements of a source, or something that depends on sources."""

from __future__ import annotations

import attrs
import torch

from weight_transfer.model.strided import Strided, coalesce, walks_of


@attrs.frozen(eq=False)
class Origin:
    """What a storage holds: a source, or a copy of elements of one.

    Attributes:
        source: the source's name.
        dtype: of the elements here.
        casts: whether they have been converted.
        layout: of a copy, how it lies in its storage.
        base: of a copy, whence it was made, and which elements of that.
    """

    source: str
    dtype: torch.dtype
    casts: bool = False
    layout: Strided | None = None
    base: tuple[Origin, Strided] | None = None


@attrs.frozen(eq=False)
class Taint:
    """What a storage holds that is no copy of a source, but depends on some.

    Attributes:
        reason: what was done, as half a sentence.
        sources: on which it depends.
    """

    reason: str
    sources: frozenset[str]


def in_source(to: Strided, frm: Strided, origin: Origin) -> tuple[Strided, Strided] | None:
    """Return which elements of the source are copied, and where to; None if they do not lie at even steps."""
    while origin.base is not None and origin.layout is not None and to.numel:
        base, whence = origin.base
        to, frm = coalesce(to, frm)
        found = walks_of(frm, origin.layout, to)
        if found is None:
            return None
        shape = tuple(walk.size for walk in found.walks)
        begin = sum(index * step for index, step in zip(found.start, whence.stride, strict=True))
        steps = tuple(walk.step * whence.stride[walk.axis] for walk in found.walks)
        to = Strided(to.offset, shape, tuple(walk.other for walk in found.walks))
        frm, origin = Strided(whence.offset + begin, shape, steps), base
    to, frm = coalesce(to, frm)
    return to, frm
