"""What is sent: an ordered list of names, dtypes and shapes, with a digest that both sides can compare."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.errors import ManifestMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


@lru_cache
def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``, such as ``"bfloat16"``.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without the ``torch.`` in front."""
    return str(dtype).removeprefix("torch.")


def _dimensions(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"a shape holds whole numbers of at least 0, got {list(shape)}")
    return shape


def _is_dtype(_instance: object, _attribute: object, name: str) -> None:
    torch_dtype(name)


@attrs.frozen
class ParamMeta:
    """One parameter.

    Attributes:
        name: as in the checkpoint, or in the worker's model for kernel format.
        dtype: as text, such as ``"bfloat16"``.
        shape: the full shape.
        nbytes: size of the contiguous tensor in bytes.
    """

    name: str
    dtype: str = attrs.field(validator=_is_dtype)
    shape: tuple[int, ...] = attrs.field(converter=_dimensions)
    nbytes: int = attrs.field(init=False, eq=False)

    @nbytes.default
    def _nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}"


def _params(params: Iterable[ParamMeta]) -> tuple[ParamMeta, ...]:
    return tuple(params)


def _unique(_instance: object, _attribute: object, params: tuple[ParamMeta, ...]) -> None:
    seen: set[str] = set()
    for param in params:
        if param.name in seen:
            raise ValueError(f"parameter {param.name!r} is listed twice")
        seen.add(param.name)


@attrs.frozen(slots=False)
class Manifest:
    """The parameters of one update, in the order in which they travel."""

    params: tuple[ParamMeta, ...] = attrs.field(converter=_params, validator=_unique)

    @cached_property
    def digest(self) -> str:
        """128 bits of SHA-256 over names, dtypes and shapes in order, as 32 hexadecimal digits."""
        return digest_json(self.to_wire())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one full copy of the weights."""
        return sum(param.nbytes for param in self.params)

    @cached_property
    def by_name(self) -> Mapping[str, ParamMeta]:
        return {param.name: param for param in self.params}

    def to_wire(self) -> dict[str, list[Any]]:
        """Return the columns ``names``, ``dtype_names`` and ``shapes``, JSON-safe."""
        return {
            "names": [param.name for param in self.params],
            "dtype_names": [param.dtype for param in self.params],
            "shapes": [list(param.shape) for param in self.params],
        }

    @classmethod
    def from_wire(cls, data: Any, _type: object = None) -> Manifest:
        """Build a manifest from `to_wire`; a manifest passes through.

        Raises:
            ValueError: the columns are missing, of unequal length or hold something else.
        """
        if isinstance(data, Manifest):
            return data
        columns = ("names", "dtype_names", "shapes")
        if (
            not isinstance(data, dict)
            or set(data) != set(columns)
            or not all(isinstance(data[c], list) for c in columns)
        ):
            raise ValueError("a manifest holds exactly the lists names, dtype_names and shapes")
        names, dtypes, shapes = (data[column] for column in columns)
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"names, dtype_names and shapes must be equally long, got {len(names)}, {len(dtypes)}, {len(shapes)}"
            )
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)):
                raise ValueError(
                    f"a parameter is a name, a dtype name and a list of sizes, got {name!r}, {dtype!r}, {shape!r}"
                )
        return cls(ParamMeta(*row) for row in zip(names, dtypes, shapes, strict=True))

    def require(self, expected: Iterable[ParamMeta], whose: str) -> None:
        """Check that this manifest holds exactly the ``expected`` parameters, in any order.

        Args:
            expected: what the other side has.
            whose: how the message calls that side, e.g. ``"the worker's model"``.

        Raises:
            ManifestMismatchError: parameters are missing, extra, or of another shape or dtype; each is named.
        """
        theirs = {param.name: param for param in expected}
        ours = self.by_name
        problems = [
            _named("is missing from the update", [name for name in theirs if name not in ours]),
            _named(f"does not exist in {whose}", [name for name in ours if name not in theirs]),
            *(
                f"{mine} was sent, but {whose} has {theirs[name].dtype} {list(theirs[name].shape)}"
                + _declare(mine, theirs[name])
                for name, mine in ours.items()
                if name in theirs and mine != theirs[name]
            ),
        ]
        found = [problem for problem in problems if problem]
        if found:
            more = f" (and {len(found) - 3} more differences)" if len(found) > 3 else ""
            raise ManifestMismatchError(f"The weights do not fit: {'; '.join(found[:3])}{more}.", phase="update")


def digest_json(data: Any) -> str:
    """Return 128 bits of SHA-256 of ``data`` in canonical JSON, as 32 hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _declare(mine: ParamMeta, theirs: ParamMeta) -> str:
    """Return what to configure if nothing but a floating point dtype differs."""
    floating = torch_dtype(mine.dtype).is_floating_point and torch_dtype(theirs.dtype).is_floating_point
    if not floating or mine.shape != theirs.shape or mine.dtype == theirs.dtype:
        return ""
    return f', to which nobody asked it to be cast; declare it on the trainer: cast = {{"*" = "{theirs.dtype}"}}'


def _named(problem: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more} {problem}"
