"""Which trainer rank holds which regions, and which regions a worker keeps.

Parameters of one shape are mostly cut alike, so both are kept, and travel, as a few patterns and the number of each
parameter's pattern: their size does not grow with the ranks times the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from weight_transfer.copying.boxes import Integers
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest, digest_json, torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.plan.coverage import require_cover
from weight_transfer.plan.merging import merged_manifest
from weight_transfer.plan.wire import column_from_wire, table_from_wire, texts_from_wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

Place = tuple[str, ...]
"""Where memory lies, from far to near: the host, then the GPU. What two places have in common makes them near."""

NONE = -1
"""The pattern of a parameter without regions: it goes whole, through ``load_weights``."""

Rows = tuple[tuple[int, ...], ...]
"""Regions of one parameter: offset and shape of each, one after the other."""


def _rows(regions: Iterable[Region]) -> Rows:
    return tuple((*region.offset, *region.shape) for region in regions)


def _region(row: Sequence[int]) -> Region:
    dims = len(row) // 2
    return Region(row[:dims], row[dims:])


@attrs.frozen(eq=False, slots=False)
class Regions:
    """Some regions of each parameter of a manifest: what one rank holds, or what one worker keeps.

    Attributes:
        manifest: the parameters.
        patterns: the different sets of regions; an empty one means that nothing of the parameter is here.
        pattern_of: int64 ``[params]``: each parameter's pattern, or `NONE`.
        place: where they lie.
    """

    manifest: Manifest
    patterns: tuple[Rows, ...]
    pattern_of: Integers
    place: Place = ()

    @classmethod
    def of(cls, manifest: Manifest, regions: Mapping[str, Sequence[Region]], place: Place = ()) -> Regions:
        """Take regions by name; a parameter that is not among them has `NONE`, an empty sequence keeps nothing.

        Raises:
            ManifestMismatchError: a name is not in the manifest, or a region lies beyond its parameter.
        """
        unknown = [name for name in regions if name not in manifest.by_name]
        if unknown:
            raise ManifestMismatchError(f"Regions were given of {unknown[0]!r}, which is not among the weights.")
        numbers: dict[Rows, int] = {}
        pattern_of = np.full(len(manifest.params), NONE, dtype=np.int64)
        for index, param in enumerate(manifest.params):
            own = regions.get(param.name)
            if own is None:
                continue
            for region in own:
                if not region.fits(param.shape):
                    raise ManifestMismatchError(f"Region {region} does not lie within {param}.")
            pattern_of[index] = numbers.setdefault(_rows(own), len(numbers))
        return cls(manifest, tuple(numbers), pattern_of, place)

    def in_manifest(self, manifest: Manifest) -> Regions:
        """Return the same regions with the parameters of a larger manifest; of those that are new, it has nothing.

        Raises:
            ManifestMismatchError: the manifest lacks a parameter, or has it with another dtype or shape.
        """
        if manifest is self.manifest:
            return self
        if manifest.digest == self.manifest.digest:
            return attrs.evolve(self, manifest=manifest)
        for param in self.manifest.params:
            if manifest.by_name.get(param.name) != param:
                raise ManifestMismatchError(f"Regions were given of {param}, which is not among the weights.")
        nothing = self.patterns.index(()) if () in self.patterns else len(self.patterns)
        pattern_of = np.full(len(manifest.params), nothing, dtype=np.int64)
        pattern_of[[manifest.numbers[param.name] for param in self.manifest.params]] = self.pattern_of
        patterns = self.patterns if nothing < len(self.patterns) else (*self.patterns, ())
        return Regions(manifest, patterns, pattern_of, self.place)

    def of_param(self, index: int) -> list[Region] | None:
        """Return the regions of a parameter, by its number in the manifest; None if it has `NONE`."""
        pattern = int(self.pattern_of[index])
        return None if pattern == NONE else list(map(_region, self.patterns[pattern]))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all regions."""
        volumes = [sum(math.prod(row[len(row) // 2 :]) for row in rows) for rows in self.patterns]
        chosen = self.pattern_of != NONE
        if not chosen.any():
            return 0
        elements = np.array(volumes, dtype=np.int64)[self.pattern_of[chosen]]
        return int((elements * itemsizes(self.manifest)[chosen]).sum())

    @cached_property
    def counts(self) -> Integers:
        """Regions of each parameter, int64 ``[params]``; 0 for `NONE`."""
        sizes = np.array([*map(len, self.patterns), 0], dtype=np.int64)
        found: Integers = sizes[self.pattern_of]
        return found

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe, without the manifest."""
        return {
            "patterns": [list(map(list, rows)) for rows in self.patterns],
            "pattern_of": self.pattern_of.tolist(),
            "place": list(self.place),
        }

    @classmethod
    def from_wire(cls, data: Any, manifest: Manifest) -> Regions:
        """Build it from `to_wire`.

        Raises:
            ManifestMismatchError: it does not fit the manifest.
        """
        try:
            patterns = tuple(map(_rows_from_wire, data["patterns"]))
            pattern_of, place = column_from_wire(data["pattern_of"]), texts_from_wire(data["place"])
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestMismatchError("Regions came in a form that this version does not know.") from error
        _require_patterns("Regions", pattern_of, len(patterns), manifest)
        for shape, pattern, index in _kinds(manifest, pattern_of):
            for row in patterns[pattern]:
                if not _region(row).fits(shape):
                    raise ManifestMismatchError(f"Region {_region(row)} does not lie within {manifest.params[index]}.")
        return cls(manifest, patterns, pattern_of, place)

    @cached_property
    def digest(self) -> str:
        """128 bits over everything but the manifest, as hexadecimal digits."""
        return digest_json(self.to_wire())


@attrs.frozen(eq=False, slots=False)
class Layout:
    """Which trainer ranks hold which regions of each parameter.

    Attributes:
        manifest: the parameters.
        patterns: the different ones, int64 ``[shards, 1 + 2 * dims]`` each: rank, offset, shape; sorted by rank.
        pattern_of: int64 ``[params]``: each parameter's pattern, or `NONE`: it goes whole, through ``load_weights``.
        places: of the ranks.
    """

    manifest: Manifest
    patterns: tuple[Integers, ...]
    pattern_of: Integers
    places: tuple[Place, ...]

    @classmethod
    def of(cls, ranks: Sequence[Regions]) -> Layout:
        """Put together what the ranks hold, in order; a parameter has `NONE` if no rank holds a region of it.

        Ranks may list different parameters; the layout's manifest is their `merged_manifest`.

        Raises:
            ManifestMismatchError: the regions of a parameter leave a gap, or overlap without being replicas; or the
                ranks disagree about it.
        """
        manifest = merged_manifest([own.manifest for own in ranks])
        interned: dict[Rows, int] = {(): 0}
        matrix = np.zeros((len(manifest.params), len(ranks)), dtype=np.int32)
        for rank, own in enumerate(own.in_manifest(manifest) for own in ranks):
            numbers = [interned.setdefault(rows, len(interned)) for rows in own.patterns]
            matrix[:, rank] = np.array([*numbers, 0], dtype=np.int32)[own.pattern_of]
        kinds: dict[bytes, int] = {bytes(4 * len(ranks)): NONE}
        pattern_of = [kinds.setdefault(row.tobytes(), len(kinds) - 1) for row in matrix]
        known = list(interned)
        patterns = [_joined([known[number] for number in np.frombuffer(kind, np.int32)]) for kind in [*kinds][1:]]
        places = tuple(own.place for own in ranks)
        layout = cls(manifest, tuple(patterns), np.array(pattern_of, dtype=np.int64), places)
        layout.require_complete()
        return layout

    def require_complete(self) -> None:
        """Raise unless the regions of each parameter cover it, once, replicas apart.

        Raises:
            ManifestMismatchError: it names the parameter and the ranks.
        """
        for _, pattern, index in _kinds(self.manifest, self.pattern_of):
            require_cover(self.patterns[pattern], self.manifest.params[index])

    def without(self, params: Iterable[int]) -> Layout:
        """Return it with `NONE` for some parameters, by number."""
        pattern_of = self.pattern_of.copy()
        pattern_of[list(params)] = NONE
        return attrs.evolve(self, pattern_of=pattern_of)

    @cached_property
    def whole(self) -> Manifest:
        """The part of the manifest that goes whole."""
        return self._part(self.pattern_of == NONE)

    @cached_property
    def by_region(self) -> Manifest:
        """The part of the manifest that goes by region."""
        return self._part(self.pattern_of != NONE)

    def _part(self, chosen: NDArray[np.bool_]) -> Manifest:
        params = [param for param, is_chosen in zip(self.manifest.params, chosen.tolist(), strict=True) if is_chosen]
        if len(params) == len(self.manifest.params):
            return self.manifest
        names = {param.name for param in params}
        aliases = {alias: name for alias, name in self.manifest.aliases.items() if name in names}
        return Manifest(params, aliases, partial=self.manifest.partial)

    def shards(self, rank: int) -> list[tuple[int, Region]]:
        """Return the shards of a rank, in the order in which pieces count them: parameter and region of each."""
        held = (pattern[pattern[:, 0] == rank, 1:].tolist() for pattern in self.patterns)
        regions = [list(map(_region, rows)) for rows in held]
        owned = np.array([*map(bool, regions), False])[self.pattern_of]
        return [
            (index, region) for index in np.flatnonzero(owned).tolist() for region in regions[self.pattern_of[index]]
        ]

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe, without the manifest."""
        return {
            "patterns": [pattern.tolist() for pattern in self.patterns],
            "pattern_of": self.pattern_of.tolist(),
            "places": list(map(list, self.places)),
        }

    @classmethod
    def from_wire(cls, data: Any, manifest: Manifest) -> Layout:
        """Build it from `to_wire`.

        Raises:
            ManifestMismatchError: it does not fit the manifest, or is not complete.
        """
        try:
            patterns = tuple(map(table_from_wire, data["patterns"]))
            pattern_of = column_from_wire(data["pattern_of"])
            places = tuple(map(texts_from_wire, data["places"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestMismatchError("A layout came in a form that this version does not know.") from error
        _require_patterns("A layout", pattern_of, len(patterns), manifest)
        for pattern in patterns:
            ranks = pattern[:, 0]
            if not len(ranks) or (ranks[1:] < ranks[:-1]).any():
                raise ManifestMismatchError("A layout came whose shards are missing, or are not in the order of ranks.")
            if not 0 <= ranks[0] <= ranks[-1] < len(places):
                raise ManifestMismatchError(
                    f"A layout of {len(places)} trainer ranks came that speaks of ranks {ranks[0]} to {ranks[-1]}."
                )
        layout = cls(manifest, patterns, pattern_of, places)
        layout.require_complete()
        return layout

    @cached_property
    def digest(self) -> str:
        """128 bits over everything, the manifest included, as hexadecimal digits."""
        return digest_json([self.manifest.digest, self.to_wire()])


def itemsizes(manifest: Manifest) -> Integers:
    """Return the bytes of an element of each parameter, int64 ``[params]``."""
    names = [param.dtype for param in manifest.params]
    sizes = {name: torch_dtype(name).itemsize for name in set(names)}
    return np.array([sizes[name] for name in names], dtype=np.int64)


def _kinds(manifest: Manifest, pattern_of: Integers) -> list[tuple[tuple[int, ...], int, int]]:
    """Return each combination of a shape and a pattern once, with the number of a parameter that has it."""
    found: dict[tuple[tuple[int, ...], int], int] = {}
    for index, (param, pattern) in enumerate(zip(manifest.params, pattern_of.tolist(), strict=True)):
        if pattern != NONE:
            found.setdefault((param.shape, pattern), index)
    return [(shape, pattern, index) for (shape, pattern), index in found.items()]


def _joined(kind: Sequence[Rows]) -> Integers:
    rows = [(rank, *row) for rank, own in enumerate(kind) for row in own]
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if rows else 1)


def _rows_from_wire(data: Any) -> Rows:
    if not isinstance(data, list) or not all(
        isinstance(row, list) and len(row) % 2 == 0 and all(type(each) is int and each >= 0 for each in row)
        for row in data
    ):
        raise ValueError(f"regions are lists of offsets and sizes, got {data!r}")
    return tuple(map(tuple, data))


def _require_patterns(what: str, pattern_of: Integers, count: int, manifest: Manifest) -> None:
    """Raise unless each parameter's pattern is one of ``count``, or `NONE`."""
    if len(pattern_of) != len(manifest.params):
        raise ManifestMismatchError(
            f"{what} came for {len(pattern_of)} weights, where the manifest has {len(manifest.params)}."
        )
    wrong = np.flatnonzero((pattern_of < NONE) | (pattern_of >= count))
    if len(wrong):
        index = int(wrong[0])
        raise ManifestMismatchError(
            f"{what} came with pattern {pattern_of[index]} of {count} for {manifest.params[index]}."
        )
