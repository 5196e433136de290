"""The control plane: small JSON messages between the trainer and its workers. Weights never travel here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_transfer.control.answers import Reply, ReplyTo, send_reply
from weight_transfer.control.channel import ControlChannel, LocalChannel
from weight_transfer.control.joining import joint_init, joint_needs, joint_report, joint_status
from weight_transfer.control.limits import HttpLimits
from weight_transfer.control.replies import Asked, Replies
from weight_transfer.control.tls import Tls

if TYPE_CHECKING:
    from weight_transfer.control.http_client import HttpChannel
    from weight_transfer.control.http_server import Server, create_app, serve

__all__ = [
    "Asked",
    "ControlChannel",
    "HttpChannel",
    "HttpLimits",
    "LocalChannel",
    "Replies",
    "Reply",
    "ReplyTo",
    "Server",
    "Tls",
    "create_app",
    "joint_init",
    "joint_needs",
    "joint_report",
    "joint_status",
    "send_reply",
    "serve",
]


def __getattr__(name: str) -> Any:
    """HTTP needs the extra ``http``; the rest of the control plane does not."""
    if name == "HttpChannel":
        from weight_transfer.control.http_client import HttpChannel

        return HttpChannel
    if name in ("Server", "create_app", "serve"):
        from weight_transfer.control import http_server

        return getattr(http_server, name)
    raise AttributeError(f"module 'weight_transfer.control' has no attribute {name!r}")
