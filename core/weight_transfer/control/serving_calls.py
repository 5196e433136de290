"""The worker's half of the control channel over HTTP: which calls there are, and what becomes of one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.settings import MAX_SECONDS
from weight_transfer.config.structuring import brief, structure
from weight_transfer.control.channel import takes_session, takes_update
from weight_transfer.errors import (
    ConfigError,
    HandshakeError,
    LifecycleError,
    ManifestMismatchError,
    RollbackError,
    TransferError,
    TransferTimeoutError,
    error_to_dict,
)
from weight_transfer.model.info import (
    TRAINER_LEFT,
    WeightNeedsRequest,
    WeightTransferAbortRequest,
    WeightTransferDecisionRequest,
    WeightTransferFinishRequest,
    WeightTransferInitRequest,
    WeightTransferStartRequest,
    WeightTransferUpdateRequest,
)

if TYPE_CHECKING:
    from weight_transfer.control.channel import ControlChannel

_STATUS = (
    (HandshakeError, 403),
    (ConfigError, 400),
    (LifecycleError, 409),
    (ManifestMismatchError, 409),
    (RollbackError, 409),
    (TransferTimeoutError, 504),
)
_LEAST = 1e-3  # seconds
SESSION = "[ -~]{0,256}"
"""How a session looks: a regular expression."""
_SESSION = re.compile(SESSION)
_LONGEST_REASON = 1000  # characters that are kept of why an update is given up


@attrs.frozen
class Offer:
    """A call that a worker takes.

    Attributes:
        call: the channel's method.
        body: the class of the request's body; None for none.
        aborts: whether it is aborted if whoever called goes away meanwhile.
        is_note: whether nobody need wait for it, so that it may come without asking for an answer.
    """

    call: Callable[..., Any]
    body: type | None
    aborts: bool = False
    is_note: bool = False


class ServedCalls:
    """Calls a channel, without the session if the channel does not carry it.

    Args:
        channel: whatever is served.

    Attributes:
        offers: the calls by name; ``status`` and those of `OPTIONAL` if the channel has them.
    """

    def __init__(self, channel: ControlChannel) -> None:
        self._channel = channel
        self._carries = takes_session(channel)
        self._names_updates = takes_update(channel)
        self.offers = {
            "init_weight_transfer_engine": Offer(channel.init_weight_transfer_engine, WeightTransferInitRequest, True),
            "start_weight_update": Offer(channel.start_weight_update, WeightTransferStartRequest, True),
            "update_weights": Offer(channel.update_weights, WeightTransferUpdateRequest, True),
            "begin_weight_update": Offer(self._begin, WeightTransferUpdateRequest, True),
            "finish_weight_update": Offer(channel.finish_weight_update, WeightTransferFinishRequest),
        }
        for name, body, is_note in (
            ("abort_weight_update", WeightTransferAbortRequest, False),
            ("expect_weight_update", WeightTransferStartRequest, True),
            ("decide_weight_update", WeightTransferDecisionRequest, True),
            ("weight_needs", WeightNeedsRequest, False),
        ):
            if hasattr(channel, name):
                self.offers[name] = Offer(getattr(channel, name), body, is_note=is_note)
        self._tells = hasattr(type(channel), "when_sampled")
        if hasattr(channel, "status"):
            self.offers["status"] = Offer(channel.status, None)

    def when_sampled(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called once an update may have to wait for samplers, at once if nobody can say that."""
        if not self._tells:
            tell()
            return _nothing
        when: Callable[[Callable[[], object]], Callable[[], None]] = self._channel.when_sampled  # type: ignore[attr-defined]
        return when(tell)

    def perform(self, name: str, body: bytes | dict[str, Any]) -> tuple[int, Any]:
        """Make a call; return the HTTP status, and what the body of the answer is, or None.

        Args:
            name: of an offer.
            body: JSON, or what it says.
        """
        offer = self.offers[name]
        try:
            arguments = {} if offer.body is None else _arguments(body, offer.body, name)
            result = offer.call(**self._carried(arguments))
        except BaseException as error:  # noqa: BLE001  (it becomes the answer: a loader may raise even what ends a process)
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            return status, {"error": error_to_dict(error)}
        return 200 if result is not None else 204, result

    def abort(self, body: bytes | dict[str, Any]) -> None:
        """Give up what a call has begun, of which this was the body: whoever made it has gone away."""
        if "abort_weight_update" in self.offers:
            self.perform("abort_weight_update", {"reason": TRAINER_LEFT} | _session_in(body))

    def _begin(self, update_info: dict[str, Any]) -> Any:
        """Start an update and receive it; the time that the start takes is the update's."""
        since = time.monotonic()
        session = {"session": update_info["session"]} if self._carries and "session" in update_info else {}
        start: Callable[..., None] = self._channel.start_weight_update
        try:
            start(**session)
        except TransferError as error:
            error.phase = error.phase or "start"
            raise
        timeout = update_info.get("timeout")
        if isinstance(timeout, (int, float)):
            update_info = update_info | {"timeout": max(timeout - (time.monotonic() - since), _LEAST)}
        return self._channel.update_weights(update_info)

    def _carried(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments without the session and the update's id, if the channel does not take them."""
        if not self._names_updates:
            arguments = {name: value for name, value in arguments.items() if name != "update"}
        if self._carries:
            return arguments
        return {name: _without_session(value) for name, value in arguments.items() if name != "session"}


def _nothing() -> None:
    pass


def _session_in(body: bytes | dict[str, Any]) -> dict[str, Any]:
    """Return the session that a call names, beside its other arguments or in one of them."""
    try:
        data = _parsed(body)
    except (ValueError, RecursionError):  # such a call has begun nothing
        data = {}
    if not isinstance(data, dict):
        return {}
    found = [data.get("session"), *(value.get("session") for value in data.values() if isinstance(value, dict))]
    return {"session": next((session for session in found if session is not None), None)}


def _parsed(body: bytes | dict[str, Any]) -> Any:
    return json.loads(body or b"{}") if isinstance(body, bytes) else body


def _without_session(value: Any) -> Any:
    return {name: item for name, item in value.items() if name != "session"} if isinstance(value, dict) else value


def _arguments(body: bytes | dict[str, Any], cls: type, name: str) -> dict[str, Any]:
    try:
        data = _parsed(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The body of /{name} is not valid JSON.", cause=str(error)) from error
    arguments = attrs.asdict(structure(data, cls, f"body of /{name}"), recurse=False)
    for where, table in (("body", arguments), *arguments.items()):
        if isinstance(table, dict):
            _check_common(table, where, name)
    if "reason" in arguments:
        arguments["reason"] = arguments["reason"][:_LONGEST_REASON]
    return arguments


def _check_common(table: dict[str, Any], where: str, name: str) -> None:
    """Check what every call may hold, beside its other arguments or in one of them, before a receiver sees it."""
    session, timeout = table.get("session"), table.get("timeout")
    if session is not None and not (isinstance(session, str) and _SESSION.fullmatch(session)):
        expected = "session: expected at most 256 printable ASCII characters"
        raise ConfigError(f"{where} of /{name}: {expected}, got {brief(session)}.")
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout <= MAX_SECONDS):
        expected = f"timeout: expected a positive number of seconds, {MAX_SECONDS:.0f} at most"
        raise ConfigError(f"{where} of /{name}: {expected}, got {brief(timeout)}.")
