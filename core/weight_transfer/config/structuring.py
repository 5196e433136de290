"""Plain dicts to attrs classes and back, strictly: no coercion, no unknown keys, and errors that name the key.

One place wraps cattrs for configuration tables, init infos and update infos alike.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.cols import list_structure_factory
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn

from weight_transfer.errors import ConfigError

T = TypeVar("T")


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
        raise ConfigError(" ".join(_sentences(error, cls, where, ""))) from error


def check_types(instance: Any) -> None:
    """Check an attrs object that was made by hand as `structure` checks a table, and in the same words.

    Raises:
        ConfigError: a field's value is not of the field's type.
    """
    for field in attrs.fields(attrs.resolve_types(type(instance))):
        try:
            _CONVERTER.structure(getattr(instance, field.name), field.type)
        except (TypeError, ValueError, IterableValidationError) as error:
            raise ConfigError(" ".join(_sentences(error, type(instance), "", field.name))) from error


def unstructure(instance: Any) -> dict[str, Any]:
    """Return an attrs instance as JSON-safe data."""
    result: dict[str, Any] = _CONVERTER.unstructure(instance)
    return result


def nearest(word: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of ``valid``, or an empty string."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentences(error: BaseException, cls: Any, where: str, path: str) -> list[str]:
    name = ": ".join(part for part in (where, path.lstrip(".")) if part)
    if isinstance(error, ForbiddenExtraKeysError):
        valid = [field.name for field in attrs.fields(error.cl)]
        return [
            f"{where}: unknown key {f'{path}.{key}'.lstrip('.')!r}{nearest(key, valid) or _listed(valid)}"
            for key in sorted(error.extra_fields)
        ]
    if isinstance(error, ClassValidationError):
        grouped, others = error.group_exceptions()
        inner = [_sentences(child, cls, where, f"{path}.{note.name}") for child, note in grouped]
        return [
            text for texts in [*inner, *(_sentences(child, cls, where, path) for child in others)] for text in texts
        ]
    if isinstance(error, IterableValidationError):
        grouped_items, others = error.group_exceptions()
        inner = [_sentences(child, cls, where, f"{path}[{note.index}]") for child, note in grouped_items]
        return [
            text for texts in [*inner, *(_sentences(child, cls, where, path) for child in others)] for text in texts
        ]
    if isinstance(error, KeyError):
        return [f"{name}: this key is required and missing."]
    return [f"{name}: {str(error).rstrip('.')}."]


def _listed(valid: list[str]) -> str:
    return f"; valid keys are {', '.join(valid)}." if valid else "; it takes no keys."


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _strict(expected: type, words: str, value: Any, _type: Any) -> Any:
    if isinstance(value, bool) is not (expected is bool) or not isinstance(value, expected):
        raise TypeError(f"expected {words}, got {_show(value)}")
    return value


def _float(value: Any, _type: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {_show(value)}")
    return float(value)


def _bytes(value: Any, _type: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, binascii.Error) as error:
        raise TypeError(f"expected base64 text, got {_show(value)}") from error


def _is_literal(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is Literal


def _literal(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ValueError(f"expected one of {', '.join(map(repr, get_args(kind)))}, got {_show(value)}")
    return value


def _int_or_str(value: Any, _type: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"expected a whole number or text, got {_show(value)}")
    return value


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
    converter.register_structure_hook(str, partial(_strict, str, "text"))
    converter.register_structure_hook(int, partial(_strict, int, "a whole number"))
    converter.register_structure_hook(bool, partial(_strict, bool, "true or false"))
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(bytes, _bytes)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook(int | str, _int_or_str)
    converter.register_structure_hook(
        int | str | None, lambda value, kind: None if value is None else _int_or_str(value, kind)
    )
    converter.register_structure_hook_factory(attrs.has, _attrs_class)
    converter.register_structure_hook_factory(_is_items, _items)
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    return converter


_CONVERTER = _make_converter()


def register(cls: type[T], from_data: Callable[[Any, Any], T], to_data: Callable[[T], Any]) -> None:
    """Give ``cls`` a JSON form of its own."""
    _CONVERTER.register_structure_hook(cls, from_data)
    _CONVERTER.register_unstructure_hook(cls, to_data)
