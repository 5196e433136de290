"""Recordings as JSON, and back: what comes in is taken only if it can be the recording of that manifest."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from weight_transfer.errors import ConfigError, ManifestMismatchError
from weight_transfer.model.manifest import Manifest, torch_dtype
from weight_transfer.model.recording import MAX_DIMS, RecordedCopy, RecordedFill, Recording, Refusal, TargetForm
from weight_transfer.model.strided import Strided

_KEYS = ("manifest", "targets", "copies", "fills", "refused", "failed", "unused", "uncovered")
_NO_JSON = {math.inf: "inf", -math.inf: "-inf"}


def recording_to_wire(recording: Recording) -> dict[str, Any]:
    """Return it as JSON-safe data, the same for the same recording."""
    return {
        "manifest": recording.manifest.digest,
        "targets": {
            name: [form.dtype, list(form.shape), list(form.stride)] for name, form in recording.targets.items()
        },
        "copies": [
            [
                *(copy.target, copy.to.offset, list(copy.to.stride)),
                *(copy.source, copy.frm.offset, list(copy.frm.stride)),
                list(copy.to.shape),
            ]
            for copy in recording.copies
        ],
        "fills": [
            [fill.target, fill.to.offset, list(fill.to.stride), list(fill.to.shape), _value_to_wire(fill.value)]
            for fill in recording.fills
        ],
        "refused": {name: [list(refusal.sources), refusal.reason] for name, refusal in recording.refused.items()},
        "failed": dict(recording.failed),
        "unused": sorted(recording.unused),
        "uncovered": {name: list(counts) for name, counts in recording.uncovered.items()},
    }


def recording_from_wire(data: Any, manifest: Manifest) -> Recording:
    """Build a recording from `recording_to_wire`.

    Raises:
        ManifestMismatchError: it is of another manifest.
        ConfigError: the data is malformed, or says something that cannot be of this manifest.
    """
    if not isinstance(data, dict) or set(data) != set(_KEYS):
        raise ConfigError(f"A recording holds exactly {', '.join(_KEYS)}; record the loader again.")
    if data["manifest"] != manifest.digest:
        raise ManifestMismatchError("The recording is of other weights than these; record the loader again.")
    try:
        return _Reader(manifest, _targets(data["targets"])).recording(data)
    except (TypeError, ValueError, KeyError) as error:
        what = f"names the unknown {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"The recording is malformed: {what}; record the loader again.") from error


class _Reader:
    """Reads what refers to sources and targets by name."""

    def __init__(self, manifest: Manifest, targets: dict[str, TargetForm]) -> None:
        self._manifest = manifest
        self._targets = targets
        self._ends = {name: form.strided.end for name, form in targets.items()}

    def recording(self, data: dict[str, Any]) -> Recording:
        refused = {name: self._refusal(name, *row) for name, row in _items(data["refused"])}
        failed = {self._source(name): _text(reason) for name, reason in _items(data["failed"])}
        copies = tuple(self._copy(*row) for row in _rows(data["copies"]))
        fills = tuple(self._fill(*row) for row in _rows(data["fills"]))
        both = refused.keys() & {*(copy.target for copy in copies), *(fill.target for fill in fills)}
        if both:
            raise ValueError(f"target {min(both)!r} is refused and written")
        given = failed.keys() & {copy.source for copy in copies}
        if given:
            raise ValueError(f"source {min(given)!r} is copied, and left to the loader")
        uncovered = {self._target(name): _two(_numbers(row)) for name, row in _items(data["uncovered"])}
        unused = frozenset(map(self._source, _list(data["unused"])))
        return Recording(self._manifest, self._targets, copies, fills, refused, failed, unused, uncovered)

    def _copy(
        self, target: Any, at: Any, to_stride: Any, source: Any, start: Any, frm_stride: Any, shape: Any
    ) -> RecordedCopy:
        param = self._manifest.by_name[_text(source)]
        to = self._written(target, at, shape, to_stride)
        frm = _strided(start, shape, frm_stride)
        if frm.end > math.prod(param.shape):
            raise ValueError(f"a copy reads beyond the end of {source!r}")
        return RecordedCopy(target, to, source, frm, param.dtype != self._targets[target].dtype)

    def _fill(self, target: Any, at: Any, stride: Any, shape: Any, value: Any) -> RecordedFill:
        return RecordedFill(target, self._written(target, at, shape, stride), _value_from_wire(value))

    def _written(self, target: Any, at: Any, shape: Any, stride: Any) -> Strided:
        to = _strided(at, shape, stride)
        if to.end > self._ends[_text(target)]:
            raise ValueError(f"something is written beyond the end of {target!r}")
        return to

    def _refusal(self, target: Any, sources: Any, reason: Any) -> Refusal:
        return Refusal(self._target(target), tuple(map(self._source, _list(sources))), _text(reason))

    def _source(self, name: Any) -> str:
        return self._manifest.by_name[_text(name)].name

    def _target(self, name: Any) -> str:
        self._targets[_text(name)]
        return str(name)


def _targets(data: Any) -> dict[str, TargetForm]:
    found = {}
    for name, row in _items(data):
        dtype, shape, stride = _list(row)
        form = TargetForm(_text(dtype), _numbers(shape), _numbers(stride))
        torch_dtype(form.dtype)
        if len(form.shape) != len(form.stride):
            raise ValueError(f"target {name!r} has shape {list(form.shape)}, but strides {list(form.stride)}")
        found[name] = form
    return found


def _strided(offset: Any, shape: Any, stride: Any) -> Strided:
    (begin,), sizes, steps = _numbers([offset]), _numbers(shape), _numbers(stride)
    if len(sizes) != len(steps) or len(sizes) > MAX_DIMS:
        raise ValueError(
            f"a view has as many sizes as strides, at most {MAX_DIMS}, got {list(sizes)} and {list(steps)}"
        )
    return Strided(begin, sizes, steps)


def _value_to_wire(value: bool | int | float) -> bool | int | float | str:
    if isinstance(value, float) and not math.isfinite(value):
        return _NO_JSON.get(value, "nan")
    return value


def _value_from_wire(value: Any) -> bool | int | float:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if not isinstance(value, bool | int | float):
        raise TypeError(f"a fill needs a number, got {reprlib.repr(value)}")
    return value


def _items(data: Any) -> list[tuple[str, Any]]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise TypeError(f"a table by name was expected, got {reprlib.repr(data)}")
    return list(data.items())


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError(f"a list was expected, got {reprlib.repr(data)}")
    return data


def _rows(data: Any) -> list[list[Any]]:
    return list(map(_list, _list(data)))


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise TypeError(f"a text was expected, got {reprlib.repr(data)}")
    return data


def _numbers(data: Any) -> tuple[int, ...]:
    numbers = _list(data)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise TypeError(f"whole numbers of at least 0 were expected, got {reprlib.repr(data)}")
    return tuple(numbers)


def _two(numbers: tuple[int, ...]) -> tuple[int, int]:
    first, second = numbers
    return first, second
