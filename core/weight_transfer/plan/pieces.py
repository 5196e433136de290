"""What each worker reads from where: the regions that it keeps, cut along the shards that hold them.

A plan is a pure function of the layout and of what a worker keeps, so that trainer and worker derive the same one.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import numpy as np

from weight_transfer.copying.boxes import Integers
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.plan.layout import NONE, Layout, Place, Regions, Rows, itemsizes

if TYPE_CHECKING:
    from weight_transfer.model.manifest import ParamMeta


@attrs.frozen(eq=False, slots=False)
class Pieces:
    """Boxes that go from a shard of a trainer rank into a target of a worker, as columns; in order of parameters.

    ``D`` is the largest number of dimensions; others are filled up at the end, with start 0 and size 1.

    Attributes:
        param: int64 ``[pieces]``: its number in the manifest.
        rank: int64 ``[pieces]``: the trainer rank that it comes from.
        shard: int64 ``[pieces]``: which of that rank's shards, in the order of `Layout.shards`.
        target: int64 ``[pieces]``: which of the worker's targets, counted over all parameters in order.
        source_start: int64 ``[pieces, D]``: its first element within the shard.
        target_start: int64 ``[pieces, D]``: its first element within the target.
        shape: int64 ``[pieces, D]``: its elements.
        itemsize: int64 ``[pieces]``: bytes of an element of the manifest's dtype.
    """

    param: Integers
    rank: Integers
    shard: Integers
    target: Integers
    source_start: Integers
    target_start: Integers
    shape: Integers
    itemsize: Integers

    def __len__(self) -> int:
        return len(self.param)

    @cached_property
    def sizes(self) -> Integers:
        """Bytes of each piece, int64 ``[pieces]``."""
        sizes: Integers = self.shape.prod(axis=1) * self.itemsize
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return int(self.sizes.sum())

    @cached_property
    def names(self) -> int:
        """How many parameters they are of."""
        return len(np.unique(self.param))

    def by_rank(self, ranks: int) -> Integers:
        """Return the bytes that come from each of the trainer's ranks, int64 ``[ranks]``."""
        return np.bincount(self.rank, weights=self.sizes, minlength=ranks).astype(np.int64)

    def where(self, chosen: Integers) -> Pieces:
        """Return those that a mask or a list of numbers chooses."""
        return Pieces(*(getattr(self, field.name)[chosen] for field in attrs.fields(Pieces)))

    def of_rank(self, rank: int) -> Pieces:
        """Return those that come from one rank."""
        return self.where(np.flatnonzero(self.rank == rank))


def plan_pieces(layout: Layout, kept: Regions, worker: int = 0) -> Pieces:
    """Cut what a worker keeps along the shards.

    Of replicas the nearest ones are taken; among those that are equally near the bytes are spread evenly, beginning
    with another one for each worker.

    Args:
        layout: what the trainer's ranks hold.
        kept: what the worker keeps, of the same manifest. Parameters that have no pattern on either side have no piece.
        worker: its number.

    Raises:
        ManifestMismatchError: layout and kept regions are of different manifests; or the worker keeps another number of
            dimensions of a parameter, which is named.
    """
    if kept.manifest is not layout.manifest and kept.manifest.digest != layout.manifest.digest:
        raise ManifestMismatchError("What a worker keeps was said of other weights than those of the layout.")
    templates = _Templates(layout, kept.place)
    param, template = _cut(layout, kept, templates)
    itemsize = itemsizes(layout.manifest)[param]
    table = templates.table()
    which = _spread(table, template, table.shape[template].prod(axis=1) * itemsize, worker)
    rank = table.ranks[template, which]
    first_targets = kept.counts.cumsum() - kept.counts
    return Pieces(
        param,
        rank,
        _first_shards(layout, param, rank) + table.orders[template, which],
        first_targets[param] + table.target[template],
        table.source_start[template],
        table.target_start[template],
        table.shape[template],
        itemsize,
    )


def _cut(layout: Layout, kept: Regions, templates: _Templates) -> tuple[Integers, Integers]:
    """Return each piece's parameter and template, in order of parameters."""
    params = np.flatnonzero((layout.pattern_of != NONE) & (kept.pattern_of != NONE))
    pairs, pair_of, counts = np.unique(
        np.stack([layout.pattern_of[params], kept.pattern_of[params]], axis=1),
        axis=0,
        return_inverse=True,
        return_counts=True,
    )
    alike = np.split(params[np.argsort(pair_of.reshape(-1), kind="stable")], counts.cumsum())[:-1]
    param, template = [_NO], [_NO]
    for (held, wanted), own in zip(pairs.tolist(), alike, strict=True):
        found = templates.cut(held, kept.patterns[wanted], layout.manifest.params[own[0]])
        param.append(np.repeat(own, len(found)))
        template.append(np.tile(found, len(own)))
    params, templates_of = np.concatenate(param), np.concatenate(template)
    order = np.lexsort((templates_of, params))
    return params[order], templates_of[order]


_NO: Integers = np.zeros(0, dtype=np.int64)


@attrs.frozen(eq=False)
class _Table:
    """How parameters of one kind are cut, as columns; ``ranks`` and ``orders`` have a column per replica.

    Attributes:
        target: number of the region among those that the worker keeps of the parameter.
        source_start: as in `Pieces`, as the next two.
        target_start: see there.
        shape: see there.
        replicas: how many there are to choose from.
        group: a number for each different set of ranks to choose from.
        ranks: theirs.
        orders: number of the shard among those that the rank has of the parameter.
    """

    target: Integers
    source_start: Integers
    target_start: Integers
    shape: Integers
    replicas: Integers
    group: Integers
    ranks: Integers
    orders: Integers


class _Templates:
    """Cuts each combination of a layout's pattern and a worker's once."""

    def __init__(self, layout: Layout, place: Place) -> None:
        self._layout = layout
        self._nearness = np.array([_common(other, place) for other in layout.places], dtype=np.int64)
        self._dims = max([1, *(len(param.shape) for param in layout.manifest.params)])
        self._groups: dict[bytes, int] = {}
        self._held: dict[int, _Held] = {}
        self._rows: list[tuple[int, Integers, Integers, Integers, int]] = []
        self._replicas: list[tuple[Integers, Integers]] = []

    def cut(self, held: int, wanted: Rows, param: ParamMeta) -> Integers:
        """Cut the regions ``wanted`` of a parameter along pattern ``held``; return the numbers of the templates."""
        if held not in self._held:
            self._held[held] = self._look(self._layout.patterns[held])
        own, first = self._held[held], len(self._rows)
        for target, row in enumerate(wanted):
            dims = len(row) // 2
            if dims != own.begin.shape[1]:
                raise ManifestMismatchError(f"A worker keeps a region of {dims} dimensions of {param}.")
            start = np.array(row[:dims], dtype=np.int64)
            end = start + np.array(row[dims:], dtype=np.int64)
            low, high = np.maximum(own.begin, start), np.minimum(own.end, end)
            for number in np.flatnonzero((low < high).all(axis=1)).tolist():
                starts = low[number] - own.begin[number], low[number] - start
                self._rows.append((target, *starts, high[number] - low[number], own.groups[number]))
                self._replicas.append(own.replicas[number])
        return np.arange(first, len(self._rows))

    def table(self) -> _Table:
        """Return all templates."""
        count, dims = len(self._rows), self._dims
        most = max((len(ranks) for ranks, _ in self._replicas), default=1)
        ranks, orders = np.zeros((2, count, most), dtype=np.int64)
        boxes = np.zeros((3, count, dims), dtype=np.int64)
        boxes[2] = 1
        for number, ((_, *box, _), (own, order)) in enumerate(zip(self._rows, self._replicas, strict=True)):
            ranks[number, : len(own)], orders[number, : len(own)] = own, order
            for column, values in zip(boxes, box, strict=True):
                column[number, : len(values)] = values
        targets = np.array([target for target, *_ in self._rows], dtype=np.int64)
        groups = np.array([group for *_, group in self._rows], dtype=np.int64)
        replicas = np.array([len(own) for own, _ in self._replicas], dtype=np.int64)
        return _Table(targets, boxes[0], boxes[1], boxes[2], replicas, groups, ranks, orders)

    def _look(self, pattern: Integers) -> _Held:
        """Find the different regions of a pattern, and the ranks from which each is taken."""
        dims = (pattern.shape[1] - 1) // 2
        ranks = pattern[:, 0]
        order = np.arange(len(ranks)) - np.searchsorted(ranks, ranks)
        regions, region_of = np.unique(pattern[:, 1:], axis=0, return_inverse=True)
        replicas, groups = [], []
        for number in range(len(regions)):
            rows = np.flatnonzero(region_of.reshape(-1) == number)
            near = self._nearness[ranks[rows]]
            rows = rows[near == near.max()]
            replicas.append((ranks[rows], order[rows]))
            groups.append(self._groups.setdefault(ranks[rows].tobytes(), len(self._groups)))
        return _Held(regions[:, :dims], regions[:, :dims] + regions[:, dims:], replicas, groups)


@attrs.frozen(eq=False)
class _Held:
    """The different regions of a pattern: bounds ``[regions, dims]``, replicas (rank and order), group of ranks."""

    begin: Integers
    end: Integers
    replicas: list[tuple[Integers, Integers]]
    groups: list[int]


def _spread(table: _Table, template: Integers, sizes: Integers, worker: int) -> Integers:
    """Choose a replica for each piece: of each group of ranks every rank gives its share of the group's bytes.

    All is computed with integers, so that every machine chooses alike.
    """
    which = np.zeros(len(template), dtype=np.int64)
    replicas, group = table.replicas[template], table.group[template]
    for number in np.unique(group[replicas > 1]).tolist():
        own = np.flatnonzero(group == number)
        count, ends = int(replicas[own[0]]), sizes[own].cumsum()
        twice_middle = 2 * ends - sizes[own]
        which[own] = (twice_middle * count // (2 * ends[-1]) + worker) % count
    return which


def _first_shards(layout: Layout, param: Integers, rank: Integers) -> Integers:
    """Return for each piece the number of its rank's first shard of its parameter."""
    ranks = len(layout.places)
    counts = np.array([np.bincount(pattern[:, 0], minlength=ranks) for pattern in layout.patterns] + [[0] * ranks])
    first = np.zeros(len(param), dtype=np.int64)
    for number in np.unique(rank).tolist():
        own = counts[layout.pattern_of, number]
        pieces = rank == number
        first[pieces] = (own.cumsum() - own)[param[pieces]]
    return first


def _common(one: Place, other: Place) -> int:
    """Return how many steps from far to near two places have in common."""
    steps = zip(one, other, strict=False)
    return next((count for count, (mine, theirs) in enumerate(steps) if mine != theirs), min(len(one), len(other)))
