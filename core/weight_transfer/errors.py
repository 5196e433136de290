"""The error tree.

    WeightTransferError
    ├── ConfigError(ValueError)
    ├── PluginError
    │   ├── BackendNotFoundError(LookupError)      name, installed, hint
    │   ├── BackendConflictError                   name, providers
    │   ├── BackendLoadError(ImportError)          name, provider, reason
    │   ├── BackendContractError(TypeError)        name, provider, reason
    │   └── BackendVersionError                    name, provider, wanted, window
    ├── BackendUnavailableError(RuntimeError)      name, provider, reason, fix
    ├── LifecycleError(RuntimeError)               method, state
    │   ├── SessionError                           (a TransferError, too)
    │   │   └── ReplacedError                      lease
    │   └── StaleCommitError                       (a TransferError, too) update
    └── TransferError                              backend, phase, version, peer
        ├── HandshakeError
        ├── TransferTimeoutError(TimeoutError)
        ├── PeerLostError(ConnectionError)         permanent
        ├── ManifestMismatchError(ValueError)
        ├── WeightsMovedError
        ├── IntegrityError(ValueError)             param, expected, got
        ├── RollbackError(ValueError)              published
        └── CommitError                            published, unpublished

Errors are data: a sentence plus typed fields. They survive pickling by a process pool and, through
`error_to_dict` and `error_from_dict`, a trip over JSON; through `embed` and `extract` also one through an RPC of which
nothing but an exception's text arrives. A foreign exception is kept as text in ``cause``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from weight_transfer.foreign_text import pack, unpack


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


def _rebuild(cls: type[WeightTransferError], fields: dict[str, Any]) -> WeightTransferError:
    return cls(**fields)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class WeightTransferError(Exception):
    """Base of everything this library raises on purpose.

    Attributes:
        message: one sentence that names the thing, what was expected and what to do.
        cause: text of the foreign exception behind it, if any (``__cause__`` does not survive a process boundary).
    """

    message: str
    cause: str | None = attrs.field(default=None, kw_only=True)

    def __str__(self) -> str:
        return f"{self.message} (cause: {self.cause})" if self.cause else self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), attrs.asdict(self))


class ConfigError(WeightTransferError, ValueError):
    """A configuration key, type or value is wrong; also a wrong ``init_info`` or ``update_info`` dict."""


class PluginError(WeightTransferError):
    """A backend plugin cannot be used; the subclasses say why."""


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendNotFoundError(PluginError, LookupError):
    """No installed distribution provides the named backend."""

    name: str = attrs.field(default="", kw_only=True)
    installed: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_texts)
    hint: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendConflictError(PluginError):
    """Two distributions provide the same backend name."""

    name: str = attrs.field(default="", kw_only=True)
    providers: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_texts)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendLoadError(PluginError, ImportError):
    """The plugin, or a class that it names, cannot be imported."""

    name: str = attrs.field(default="", kw_only=True)
    provider: str = attrs.field(default="", kw_only=True)
    reason: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendContractError(PluginError, TypeError):
    """The plugin breaks the contract: wrong type, wrong name or an unknown hook."""

    name: str = attrs.field(default="", kw_only=True)
    provider: str = attrs.field(default="", kw_only=True)
    reason: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendVersionError(PluginError):
    """The plugin was written for an API version that this core does not offer."""

    name: str = attrs.field(default="", kw_only=True)
    provider: str = attrs.field(default="", kw_only=True)
    wanted: tuple[int, ...] = attrs.field(default=(), kw_only=True, converter=_numbers)
    window: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class BackendUnavailableError(WeightTransferError, RuntimeError):
    """The backend is installed but this machine lacks what it needs."""

    name: str = attrs.field(default="", kw_only=True)
    provider: str = attrs.field(default="", kw_only=True)
    reason: str = attrs.field(default="", kw_only=True)
    fix: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class LifecycleError(WeightTransferError, RuntimeError):
    """A method was called in a state that does not allow it."""

    method: str = attrs.field(default="", kw_only=True)
    state: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class TransferError(WeightTransferError):
    """An update, or the handshake before it, failed.

    Attributes:
        backend: the backend's name.
        phase: ``init``, ``start``, ``update``, ``finish``, ``abort`` or ``status``.
        version: the weight version that was under way.
        peer: the worker (its address or index) or ``trainer`` that the error is about.
    """

    backend: str | None = attrs.field(default=None, kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    version: int | str | None = attrs.field(default=None, kw_only=True)
    peer: str | None = attrs.field(default=None, kw_only=True)

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.peer}: {text}" if self.peer and self.peer not in text else text


class HandshakeError(TransferError):
    """A peer is not who or what was expected: wrong token, wrong protocol, malformed message."""


class TransferTimeoutError(TransferError, TimeoutError):
    """A deadline passed. After this error nothing writes into the caller's memory any more."""


@attrs.define(slots=False, eq=False, str=False, repr=False)
class PeerLostError(TransferError, ConnectionError):
    """A peer died, or its connection did.

    Attributes:
        permanent: True if asking again cannot help: nobody knows the name of its host.
    """

    permanent: bool = attrs.field(default=False, kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class SessionError(LifecycleError, TransferError):
    """A worker was called by a trainer that it has not joined, or not joined last; the next ``send`` joins it again."""


@attrs.define(slots=False, eq=False, str=False, repr=False)
class ReplacedError(SessionError):
    """Another trainer has taken the worker over, so that this one is refused for good; a new `WeightSender` is not.

    Attributes:
        lease: number of the other one's lease, which the worker's ``status`` shows, too.
    """

    lease: int = attrs.field(default=0, kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class StaleCommitError(LifecycleError, TransferError):
    """A worker was told to publish another update than the one that it has received: an old call, or a stranger's.

    Attributes:
        update: id of the update that was to be published.
    """

    update: str = attrs.field(default="", kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class RollbackError(TransferError, ValueError):
    """A version is lower than the last one that the worker has published, and nobody asked for that.

    Attributes:
        published: the worker's last version.
    """

    published: int | str | None = attrs.field(default=None, kw_only=True)


@attrs.define(slots=False, eq=False, str=False, repr=False)
class CommitError(TransferError):
    """All workers had received the version, and some have published it, but not all.

    Attributes:
        published: addresses of the workers that serve the version.
        unpublished: addresses of the others. They serve none until the next ``send``; or they have published, too, and
            it is their answer that was lost.
    """

    published: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_texts)
    unpublished: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_texts)


class ManifestMismatchError(TransferError, ValueError):
    """Both sides disagree about names, shapes, dtypes or the transfer plan."""


class WeightsMovedError(TransferError):
    """Weights lie elsewhere than when the update began, on one side; it is given up, and `send` itself sends anew."""


@attrs.define(slots=False, eq=False, str=False, repr=False)
class IntegrityError(TransferError, ValueError):
    """Bytes arrived, or lie on disk, that are not the bytes that were meant."""

    param: str | None = attrs.field(default=None, kw_only=True)
    expected: str | None = attrs.field(default=None, kw_only=True)
    got: str | None = attrs.field(default=None, kw_only=True)


def _tree(cls: type[WeightTransferError]) -> dict[str, type[WeightTransferError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


def error_to_dict(error: BaseException) -> dict[str, Any]:
    """Return ``error`` as a JSON-safe dict: ``type``, ``message`` and the class's own fields."""
    if not isinstance(error, WeightTransferError):
        message = _writable(f"{type(error).__name__}: {error}")
        return {"type": "TransferError", "message": "The other side failed unexpectedly.", "cause": message}
    return {
        "type": type(error).__name__,
        **{key: _writable(value) for key, value in attrs.asdict(error).items() if value is not None},
    }


def _writable(value: Any) -> Any:
    """Escape halves of characters (lone surrogates), which no encoding has."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_writable, value))
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def error_from_dict(data: dict[str, Any]) -> WeightTransferError:
    """Rebuild an error from `error_to_dict`; an unknown type becomes a `TransferError`.

    Whatever the dict holds, this returns an error: fields that the class lacks are dropped, and so are those whose
    values are not of the field's type.
    """
    cls = _tree(WeightTransferError).get(str(data.get("type")), TransferError)
    fields = {
        field.name: data[field.name]
        for field in attrs.fields(cls)
        if field.name in data and _fits(data[field.name], field.type)
    }
    fields.setdefault("message", "The other side failed without a message.")
    try:
        return cls(**fields)
    except TypeError:  # a class of a plugin's own, with a field that has no default
        return TransferError(fields["message"], cause=fields.get("cause"))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _each(is_one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(is_one, value))


_KINDS: dict[str, Callable[[object], bool]] = {
    "str": _is_text,
    "str | None": lambda value: value is None or _is_text(value),
    "int | str | None": lambda value: value is None or _is_text(value) or _is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "int": _is_number,
    "float": lambda value: isinstance(value, float) or _is_number(value),
    "tuple[str, ...]": _each(_is_text),
    "tuple[int, ...]": _each(_is_number),
}
"""By the type of a field, whether it takes a value that came as JSON."""


def _fits(value: object, kind: object) -> bool:
    is_one = _KINDS.get(kind if isinstance(kind, str) else inspect.formatannotation(kind))
    return is_one is not None and is_one(value)


def embed(error: BaseException) -> str:
    """Return ``error`` as text from which `extract` rebuilds it, for an RPC that hands on an exception's text alone.

    ``raise RuntimeError(embed(error))`` on one side is ``extract(str(caught))`` on the other. First comes the class and
    the sentence, for people; behind it the fields, in groups of letters and digits. The whole has at most 8,000
    characters: texts that are very long are shortened in the middle.

    Args:
        error: one of this library; a foreign exception becomes the ``cause`` of a `TransferError`.
    """
    fields = error_to_dict(error)
    return pack(f"{fields['type']}: {error}" if isinstance(error, WeightTransferError) else fields["cause"], fields)


def extract(text: str) -> WeightTransferError | None:
    """Return the error that `embed` has put into ``text``; None if there is none, or not all of it has arrived.

    The text may have gone through JSON, HTML, a log or a traceback on its way, also in the middle of it. Of several
    errors the first one that is complete is returned. Whatever the text holds, nothing else is made of it than an error
    of this library, and no exception is raised.
    """
    fields = unpack(text)
    return None if fields is None else error_from_dict(fields)
