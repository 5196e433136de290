"""Plain dicts to attrs classes and back, strictly: no coercion, no unknown keys, and errors that name the key.

One place wraps cattrs for configuration tables, init infos and update infos alike.
"""

from __future__ import annotations

import base64
import difflib
import itertools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import list_structure_factory, mapping_structure_factory
from cattrs.errors import (
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn

from weight_transfer.errors import ConfigError

T = TypeVar("T")

MAX_INT = 2**63 - 1
"""The largest whole number that a field takes; the smallest is its negative."""
_LONGEST = 80  # characters of a value in a message
_MOST_SENTENCES = 8  # of one error


def structure(data: Mapping[str, Any], cls: type[T], where: str) -> T:
    """Build ``cls`` from ``data``.

    A field whose value is already an instance of its attrs class is taken as it is.

    Args:
        data: plain JSON or TOML data.
        cls: an attrs class.
        where: how messages call this dict, e.g. ``[weight_transfer.ipc]``.

    Raises:
        ConfigError: a key is unknown (the nearest valid one is named), missing or of a wrong type or value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a table of keys and values, got {_show(data)}.")
    try:
        return _CONVERTER.structure(data, cls)
    except Exception as error:
        raise _refusal(error, where, "") from error


def check_types(instance: Any) -> None:
    """Check an attrs object that was made by hand as `structure` checks a table, and in the same words.

    Raises:
        ConfigError: a field's value is not of the field's type.
    """
    for field in attrs.fields(attrs.resolve_types(type(instance))):
        try:
            _CONVERTER.structure(getattr(instance, field.name), field.type)
        except Exception as error:
            raise _refusal(error, "", field.name) from error


def unstructure(instance: Any) -> dict[str, Any]:
    """Return an attrs instance as JSON-safe data."""
    result: dict[str, Any] = _CONVERTER.unstructure(instance)
    return result


def nearest(word: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of ``valid``, or an empty string."""
    if len(word) > _LONGEST:
        return ""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def brief(value: object) -> str:
    """Return a value as messages show it: short, printable and in a moment, whatever it is."""
    text = _BRIEF.repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def require_text(value: str) -> str:
    """Return a text as it is.

    Raises:
        ValueError: it cannot be written anywhere, since it holds half of a character (a lone surrogate).
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"expected text, got {brief(value)}, which holds half of a character") from None
    return value


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = _LONGEST

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(x, level).encode(errors="backslashreplace").decode()


_BRIEF = _Brief()


def _refusal(error: Exception, where: str, path: str) -> ConfigError:
    sentences = list(itertools.islice(_sentences(error, where, path), _MOST_SENTENCES + 1))
    if len(sentences) > _MOST_SENTENCES:
        sentences[-1] = "And so on."
    return ConfigError(" ".join(sentences).encode(errors="backslashreplace").decode())


def _sentences(error: BaseException, where: str, path: str) -> Iterator[str]:
    name = ": ".join(part for part in (where, path.lstrip(".")) if part)
    if isinstance(error, ForbiddenExtraKeysError):
        valid = [field.name for field in attrs.fields(error.cl)]
        keys = (key if isinstance(key, str) else brief(key) for key in error.extra_fields)
        for key in sorted(keys):
            yield f"{where}: unknown key {brief(f'{path}.{key}'.lstrip('.'))}{nearest(key, valid) or _listed(valid)}"
    elif isinstance(error, (ClassValidationError, IterableValidationError)):
        grouped, others = error.group_exceptions()
        for child, note in grouped:
            yield from _sentences(child, where, f"{path}{_step(note)}")
        for child in others:
            yield from _sentences(child, where, path)
    elif isinstance(error, KeyError):
        yield f"{name}: this key is required and missing."
    else:
        yield f"{name}: {str(error).rstrip('.')}."


def _step(note: Any) -> str:
    return f"[{brief(note.index)}]" if isinstance(note, IterableValidationNote) else f".{note.name}"


def _listed(valid: list[str]) -> str:
    return f"; valid keys are {', '.join(valid)}." if valid else "; it takes no keys."


def _show(value: object) -> str:
    return f"{brief(value)} ({type(value).__name__})"


def _bool(value: Any, _type: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {_show(value)}")
    return value


def _text(value: Any, _type: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {_show(value)}")
    return require_text(value)


def _int(value: Any, _type: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -MAX_INT <= value <= MAX_INT:
        raise TypeError(f"expected a whole number, got {_show(value)}")
    return value


def _float(value: Any, _type: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {_show(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected a number, got {_show(value)}, which is too large") from None


def _bytes(value: Any, _type: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected base64 text, got {_show(value)}") from error


def _is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _literal(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"expected one of {', '.join(map(repr, get_args(kind)))}, got {_show(value)}")
    return value


def _int_or_str(value: Any, kind: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"expected a whole number or text, got {_show(value)}")
    return _text(value, kind) if isinstance(value, str) else _int(value, kind)


def _items(kind: Any, converter: cattrs.Converter) -> Any:
    """Take lists and tuples only: cattrs would take any iterable, such as the letters of a word."""
    build = list_structure_factory(kind, converter)

    def check_and_build(value: Any, kind: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list, got {_show(value)}")
        return get_origin(kind)(build(value, kind))

    return check_and_build


def _is_items(kind: Any) -> bool:
    return get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[1:] == (...,))


def _is_table(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is dict


def _table(kind: Any, converter: cattrs.Converter) -> Any:
    build = mapping_structure_factory(kind, converter)
    takes_anything = get_args(kind) == (str, Any)

    def check_and_build(value: Any, kind: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"expected a table, got {_show(value)}")
        if takes_anything and all(type(name) is str and name.isascii() for name in value):
            return dict(value)
        return build(value, kind)

    return check_and_build


def _attrs_class(cls: Any, converter: cattrs.Converter) -> Any:
    build = make_dict_structure_fn(cls, converter)

    def pass_or_build(value: Any, kind: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"expected a table, got {_show(value)}")
        return build(value, kind)

    return pass_or_build


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(int, _int)
    converter.register_structure_hook(bool, _bool)
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(bytes, _bytes)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook(int | str, _int_or_str)
    converter.register_structure_hook(
        int | str | None, lambda value, kind: None if value is None else _int_or_str(value, kind)
    )
    converter.register_structure_hook_factory(attrs.has, _attrs_class)
    converter.register_structure_hook_factory(_is_items, _items)
    converter.register_structure_hook_factory(_is_table, _table)
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    return converter


_CONVERTER = _make_converter()


def register(cls: type[T], from_data: Callable[[Any, Any], T], to_data: Callable[[T], Any]) -> None:
    """Give ``cls`` a JSON form of its own."""
    _CONVERTER.register_structure_hook(cls, from_data)
    _CONVERTER.register_unstructure_hook(cls, to_data)
