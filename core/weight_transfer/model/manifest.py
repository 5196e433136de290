"""What is sent: an ordered list of names, dtypes and shapes, with a digest that both sides can compare."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import MAX_INT, brief, require_text
from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.naming import suggested_rename
from weight_transfer.values.report import sized

if TYPE_CHECKING:
    import torch


@lru_cache
def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``, such as ``"bfloat16"``.

    Raises:
        ValueError: torch has no dtype of that name.
    """
    import torch

    dtype = vars(torch).get(name)  # torch imports whole packages when it is asked for their names as attributes
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {brief(name)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without the ``torch.`` in front."""
    return str(dtype).removeprefix("torch.")


_MAX_DIMENSIONS = 64  # torch's own limit


def _dimensions(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"a shape holds whole numbers of at least 0, got {brief(list(shape))}")
    if len(shape) > _MAX_DIMENSIONS or any(size > MAX_INT for size in shape):
        raise ValueError(f"no tensor has the shape {brief(list(shape))}")
    return shape


def _is_dtype(_instance: object, _attribute: object, name: str) -> None:
    torch_dtype(name)


def _is_name(_instance: object, _attribute: object, name: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"a parameter's name is text, got {brief(name)}")
    require_text(name)


@attrs.frozen
class ParamMeta:
    """One parameter.

    Attributes:
        name: as in the checkpoint, or in the worker's model for kernel format.
        dtype: as text, such as ``"bfloat16"``.
        shape: the full shape.
        nbytes: size of the contiguous tensor in bytes.
    """

    name: str = attrs.field(validator=_is_name)
    dtype: str = attrs.field(validator=_is_dtype)
    shape: tuple[int, ...] = attrs.field(converter=_dimensions)
    nbytes: int = attrs.field(init=False, eq=False)

    @nbytes.default
    def _nbytes(self) -> int:
        nbytes = math.prod(self.shape) * torch_dtype(self.dtype).itemsize
        if nbytes > MAX_INT:
            raise ValueError(f"no tensor has the shape {brief(list(self.shape))}")
        return nbytes

    def is_like(self, other: ParamMeta) -> bool:
        """Whether the other one has the same dtype and shape."""
        return self.dtype == other.dtype and self.shape == other.shape

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}"


def _params(params: Iterable[ParamMeta]) -> tuple[ParamMeta, ...]:
    return tuple(params)


def _unique(_instance: object, _attribute: object, params: tuple[ParamMeta, ...]) -> None:
    seen: set[str] = set()
    for param in params:
        if param.name in seen:
            raise ValueError(f"parameter {brief(param.name)} is listed twice")
        seen.add(param.name)


def _names(names: Mapping[str, str]) -> dict[str, str]:
    return dict(names)


def _known(manifest: Manifest, _attribute: object, aliases: Mapping[str, str]) -> None:
    names = {param.name for param in manifest.params}
    for alias, name in aliases.items():
        if alias in names or name not in names:
            raise ValueError(f"{brief(alias)} is no further name of a listed parameter, but stands for {brief(name)}")
        require_text(alias)


@attrs.frozen(slots=False)
class Manifest:
    """The parameters of one update, in the order in which they travel.

    Attributes:
        params: each memory once.
        aliases: further names of parameters that are tied, and the name under which each travels.
        partial: whether these are some of the weights, and the worker keeps the others as they are.
    """

    params: tuple[ParamMeta, ...] = attrs.field(converter=_params, validator=_unique)
    aliases: Mapping[str, str] = attrs.field(factory=dict, converter=_names, validator=_known, hash=False)
    partial: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    def __repr__(self) -> str:
        part = ", partial" if self.partial else ""
        return f"<Manifest of {len(self.params)} weights, {sized(self.nbytes)}{part}>"

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

    def without(self, names: Collection[str]) -> Manifest:
        """Return it without some parameters and their aliases; itself if it has none of them."""
        params = [param for param in self.params if param.name not in names]
        if len(params) == len(self.params):
            return self
        aliases = {alias: name for alias, name in self.aliases.items() if name not in names}
        return Manifest(params, aliases, self.partial)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Each parameter's place in ``params``, by name."""
        return {param.name: number for number, param in enumerate(self.params)}

    def to_wire(self) -> dict[str, Any]:
        """Return the columns ``names``, ``dtype_names`` and ``shapes`` (``aliases``, ``partial`` if set), JSON-safe."""
        columns: dict[str, Any] = {
            "names": [param.name for param in self.params],
            "dtype_names": [param.dtype for param in self.params],
            "shapes": [list(param.shape) for param in self.params],
        }
        if self.aliases:
            columns["aliases"] = dict(self.aliases)
        if self.partial:
            columns["partial"] = True
        return columns

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
            or set(data) - {"aliases", "partial"} != set(columns)
            or not all(isinstance(data[c], list) for c in columns)
        ):
            raise ValueError("a manifest holds exactly the lists names, dtype_names and shapes, and may hold aliases")
        aliases, partial = data.get("aliases", {}), data.get("partial", False)
        if not isinstance(aliases, dict) or not all(isinstance(name, str) for pair in aliases.items() for name in pair):
            raise ValueError(f"a manifest's aliases are names by name, got {brief(aliases)}")
        if not isinstance(partial, bool):
            raise ValueError(f"a manifest is partial or not, got {brief(partial)}")
        names, dtypes, shapes = (data[column] for column in columns)
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"names, dtype_names and shapes must be equally long, got {len(names)}, {len(dtypes)}, {len(shapes)}"
            )
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)):
                raise ValueError(
                    f"a parameter is a name, a dtype name and a list of sizes, got {brief(name)}, {brief(dtype)}, "
                    f"{brief(shape)}"
                )
        return cls((ParamMeta(*row) for row in zip(names, dtypes, shapes, strict=True)), aliases, partial)

    def require(
        self, expected: Iterable[ParamMeta], whose: str, aliases: Mapping[str, str] | None = None
    ) -> Mapping[str, tuple[str, ...]]:
        """Check that this manifest holds exactly the ``expected`` parameters (if partial, some of them), in any order.

        Parameters that are tied on either side are the same under each of their names.

        Args:
            expected: what the other side has, each memory once.
            whose: how the message calls that side, e.g. ``"the worker's model"``.
            aliases: further names of the expected parameters that are tied there, and whose they are.

        Returns:
            For each parameter of this manifest the names of those that take its bytes: several, if they are tied here.

        Raises:
            ManifestMismatchError: parameters are missing, extra, tied on the other side alone, or of another shape or
                dtype; each is named.
        """
        theirs = {param.name: param for param in expected}
        takers, tied, missing = self._takers(theirs, aliases or {})
        extra = [name for name in self.by_name if name not in takers]
        sent = ((self.by_name[name], theirs[taker]) for name, names in takers.items() for taker in names)
        unlike = [(mine, their) for mine, their in sent if not mine.is_like(their)]
        problems = [
            "" if self.partial else _named("is missing from the update", "are missing from the update", missing),
            _named(f"does not exist in {whose}", f"do not exist in {whose}", extra),
            *(f"{' and '.join(map(repr, names))} are one weight in {whose} but not on the trainer" for names in tied),
            *(f"{mine} was sent, but {whose} has {their.dtype} {list(their.shape)}" for mine, their in unlike),
        ]
        found = [problem for problem in problems if problem]
        if found:
            left = len(found) - 3
            more = f" (and {left} more difference{'s' if left > 1 else ''})" if left > 0 else ""
            rename = suggested_rename(self.by_name, theirs) if missing and extra else ""
            hint = f" On the trainer, ModuleSource(model, {rename}) gives them these names." if rename else ""
            hint += next(filter(None, itertools.starmap(cast_hint, unlike)), "")
            raise ManifestMismatchError(f"The weights do not fit: {'; '.join(found[:3])}{more}.{hint}", phase="update")
        return takers

    def _takers(
        self, theirs: Mapping[str, ParamMeta], aliases: Mapping[str, str]
    ) -> tuple[dict[str, tuple[str, ...]], list[list[str]], list[str]]:
        """Match names: return who takes each parameter, what is one weight there but not here, and what nobody sent."""
        called = {name: [name] for name in theirs}
        for alias, name in aliases.items():
            called[name].append(alias)
        takers: dict[str, tuple[str, ...]] = {}
        tied, missing = [], []
        for name, names in called.items():
            sent = list(dict.fromkeys(filter(None, map(self._travels_as, names))))
            if not sent:
                missing.append(name)
            elif len(sent) > 1:
                tied.append(sent)
            for each in sent:
                takers[each] = (*takers.get(each, ()), name)
        return takers, tied, missing

    def _travels_as(self, name: str) -> str | None:
        return name if name in self.by_name else self.aliases.get(name)


def digest_json(data: Any) -> str:
    """Return 128 bits of SHA-256 of ``data`` in canonical JSON, as 32 hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cast_hint(mine: ParamMeta, theirs: ParamMeta) -> str:
    """Return what to configure if nothing but a floating point dtype differs from what was sent; else nothing."""
    floating = torch_dtype(mine.dtype).is_floating_point and torch_dtype(theirs.dtype).is_floating_point
    if not floating or mine.shape != theirs.shape or mine.dtype == theirs.dtype:
        return ""
    return f' If they are to be cast, declare it on the trainer: cast = {{"*" = "{theirs.dtype}"}}.'


def _named(one: str, several: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{names[0]!r} and {len(names) - 1} more {several}" if len(names) > 1 else f"{names[0]!r} {one}"
