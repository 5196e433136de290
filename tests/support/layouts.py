"""Random layouts, whose elements are told apart by their values: a plain reference for regions, pieces and boxes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from hypothesis import strategies as st

from weight_transfer import ParamMeta
from weight_transfer.model.manifest import Manifest
from weight_transfer.model.regions import Region
from weight_transfer.plan.boxes import Tensors, boxes_of
from weight_transfer.plan.layout import Layout, Regions

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Boxes
    from weight_transfer.plan.pieces import Pieces

UNTOUCHED = -1
PLACES = st.tuples(st.sampled_from(("near", "far")), st.sampled_from(("0", "1")))
SHAPES = st.lists(st.sampled_from((1, 2, 3, 4, 5, 6, 0)), max_size=4).map(tuple)


@attrs.frozen(kw_only=True)
class World:
    """What a trainer's ranks have, and what one worker keeps.

    Attributes:
        manifest: every parameter is of int32.
        held: by rank, regions by name.
        rank_places: theirs.
        kept: of the worker.
        place: its own.
        seed: chooses strides.
    """

    manifest: Manifest
    held: Sequence[dict[str, list[Region]]]
    rank_places: Sequence[tuple[str, ...]]
    kept: dict[str, list[Region]]
    place: tuple[str, ...]
    seed: int

    def layout(self) -> Layout:
        ranks = zip(self.held, self.rank_places, strict=True)
        return Layout.of([Regions.of(self.manifest, held, place) for held, place in ranks])

    def needs(self) -> Regions:
        return Regions.of(self.manifest, self.kept, self.place)

    def full(self, param: int) -> np.ndarray:
        """Return a parameter; no two elements of any parameters are equal."""
        shape = self.manifest.params[param].shape
        return np.arange(math.prod(shape), dtype=np.int32).reshape(shape) + 10_000 * param

    def targets(self) -> list[tuple[int, Region, np.ndarray]]:
        """Return what the worker keeps, as pieces count it, with untouched arrays of any strides."""
        rng = np.random.default_rng(self.seed)
        return [
            (index, region, strided(np.full(region.shape, UNTOUCHED, dtype=np.int32), rng))
            for index, param in enumerate(self.manifest.params)
            for region in self.kept.get(param.name, [])
        ]

    def shards(self, layout: Layout, rank: int) -> list[np.ndarray]:
        """Return the arrays of a rank's shards, of any strides."""
        rng = np.random.default_rng(self.seed + 1 + rank)
        return [strided(self.full(index)[region.slices], rng) for index, region in layout.shards(rank)]


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Cut a parameter into boxes that cover it once, some of them perhaps empty."""
    regions = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, region.shape[dim]))
        first, second, offset = list(region.shape), list(region.shape), list(region.offset)
        first[dim], second[dim], offset[dim] = at, region.shape[dim] - at, offset[dim] + at
        regions += [Region(region.offset, first), Region(offset, second)]
    return regions


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw one to four ranks, up to five parameters, replicas, and targets that may overlap one another's regions."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=5))
    manifest = Manifest(ParamMeta(f"p{index}", "int32", shape) for index, shape in enumerate(shapes))
    ranks = draw(st.integers(1, 4))
    held: list[dict[str, list[Region]]] = [{} for _ in range(ranks)]
    kept = {}
    for param in manifest.params:
        if draw(st.integers(0, 9)):
            for region in draw(cuts(param.shape)):
                for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                    held[rank].setdefault(param.name, []).append(region)
        if draw(st.integers(0, 9)):
            kept[param.name] = [region for region in draw(cuts(param.shape)) if draw(st.integers(0, 3))]
    places = [draw(PLACES) for _ in range(ranks)]
    seed = draw(st.integers(0, 999))
    return World(manifest=manifest, held=held, rank_places=places, kept=kept, place=draw(PLACES), seed=seed)


def strided(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a copy that is contiguous, in Fortran's order, of permuted dimensions, or a part of a larger array."""
    if not values.ndim:
        return np.array(values)
    order = rng.permutation(values.ndim)
    steps = [int(step) for step in rng.integers(1, 3, size=values.ndim)]
    margins = [int(margin) for margin in rng.integers(0, 2, size=values.ndim)]
    kind = rng.integers(4)
    if kind == 0:
        return values.copy()
    if kind == 1:
        return np.array(values, order="F")
    if kind == 2:
        return values.transpose(order).copy().transpose(np.argsort(order))
    room = np.zeros([size * step + margin for size, step, margin in zip(values.shape, steps, margins, strict=True)])
    view = room.astype(values.dtype)[tuple(slice(m, None, s) for m, s in zip(margins, steps, strict=True))]
    view = view[tuple(slice(size) for size in values.shape)]
    view[...] = values
    return view


def memory(arrays: Sequence[np.ndarray], dims: int) -> Tensors:
    strides = [[step // array.itemsize for step in array.strides] for array in arrays]
    return Tensors.of([array.ctypes.data for array in arrays], strides, dims)


def copy_boxes(boxes: Boxes) -> None:
    """Do what boxes say, byte for byte."""
    for index in range(len(boxes)):
        for run in range(int(boxes.count[index])):
            target = int(boxes.target[index] + run * boxes.target_step[index])
            ctypes.memmove(target, int(boxes.source[index] + run * boxes.source_step[index]), int(boxes.run[index]))


def boxes_between(mine: Pieces, shards: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Boxes:
    dims = mine.shape.shape[1]
    return boxes_of(mine, memory(shards, dims), memory(targets, dims))


def same_columns(one: Any, other: Any) -> bool:
    names = [field.name for field in attrs.fields(type(one))]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
