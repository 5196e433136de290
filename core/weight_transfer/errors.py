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
    │   └── SessionError                           (a TransferError, too)
    └── TransferError                              backend, phase, version, peer
        ├── HandshakeError
        ├── TransferTimeoutError(TimeoutError)
        ├── PeerLostError(ConnectionError)         permanent
        ├── ManifestMismatchError(ValueError)
        └── IntegrityError(ValueError)             param, expected, got

Errors are data: a sentence plus typed fields. They survive pickling by a process pool and, through
`error_to_dict` and `error_from_dict`, a trip over JSON. A foreign exception is kept as text in ``cause``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs


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


class ManifestMismatchError(TransferError, ValueError):
    """Both sides disagree about names, shapes, dtypes or the transfer plan."""


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
        message = f"{type(error).__name__}: {error}"
        return {"type": "TransferError", "message": "The other side failed unexpectedly.", "cause": message}
    return {
        "type": type(error).__name__,
        **{key: value for key, value in attrs.asdict(error).items() if value is not None},
    }


def error_from_dict(data: dict[str, Any]) -> WeightTransferError:
    """Rebuild an error from `error_to_dict`; an unknown type becomes a `TransferError`."""
    fields = {key: value for key, value in data.items() if key != "type"}
    cls = _tree(WeightTransferError).get(str(data.get("type")), TransferError)
    known = {field.name for field in attrs.fields(cls)}
    fields = {key: value for key, value in fields.items() if key in known}
    if not isinstance(fields.get("message"), str):
        fields["message"] = "The other side failed without a message."
    return cls(**fields)
