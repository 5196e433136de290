"""The hooks. Rule: many may listen -> a hook; exactly one answers -> a field of the descriptor or a method of an ABC.

Mark an implementation with `hookimpl`. Give its parameters no default values: pluggy 1.6 and 1.7 treat
those differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from weight_transfer.plugins.backend import Backend, Check
    from weight_transfer.values.events import MembershipChanged, TransferFinished, TransferProgress, TransferStarted

PROJECT = "weight_transfer"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def weight_transfer_backend() -> Backend | None:
    """Return the backend that this plugin provides.

    Called once, when the backend's name was asked for. Must be cheap: import nothing but the core.
    """


@hookspec
def weight_transfer_diagnostics() -> dict[str, str] | None:
    """Return facts that help to find a fault, as ``{title: text}``.

    Called by ``weight-transfer backends --check``. May import and query the transport.
    """


@hookspec
def weight_transfer_checks() -> list[Check] | None:
    """Look at what this backend needs here, or is faster with.

    Called by ``weight-transfer doctor``. May import and query the transport.
    """


@hookspec
def weight_transfer_started(event: TransferStarted) -> None:
    """Be told that an update begins.

    Args:
        event: who, what and how much.
    """


@hookspec
def weight_transfer_progress(event: TransferProgress) -> None:
    """Be told that bytes have moved; called at most a few times a second.

    Args:
        event: bytes done and in total.
    """


@hookspec
def weight_transfer_finished(event: TransferFinished) -> None:
    """Be told that an update ended, well or badly.

    Args:
        event: bytes, seconds and the error, if any.
    """


@hookspec
def weight_transfer_membership(event: MembershipChanged) -> None:
    """Be told, in the trainer, that a worker has joined or was lost.

    Args:
        event: who, and why.
    """
