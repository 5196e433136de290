"""What the trainer's half says to the worker's, inside the dicts that vLLM carries for us unread.

vLLM takes one dict to all workers of an engine and brings nothing back. So the dict is an envelope: which call it is,
its data, and where each worker answers (`weight_transfer.control.send_reply`).

| call | by vLLM's | data | each worker's result |
|---|---|---|---|
| ``status`` | init | ``session`` | `WeightReceiver.status`, with ``open``, ``served`` and ``yours`` |
| ``init`` | init | an init info | `WeightReceiver.init_weight_transfer_engine` |
| ``weight_needs`` | init | a request | `WeightReceiver.weight_needs` |
| ``update`` | update | an update info | `WeightReceiver.update_weights` |
| ``abort`` | init | ``reason``, ``session`` | ``{"open": ..., "served": ...}`` |
| ``leave`` | init | ``{}`` | None |

``open`` says whether vLLM's own session of updates is open on this worker: one was started, and neither did its update
raise there nor was it finished. ``served`` says whether the model is whole, of one version, and may generate; ``yours``
whether the trainer that joined last named this session when it did (None: it named none). An abort of another session
is refused with a `SessionError`: what is open is another trainer's by then. A worker answers ``status`` and ``init``
even if it has never joined anybody. vLLM's start and finish carry no envelope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from weight_transfer.control import ReplyTo
from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Call = Literal["init", "weight_needs", "status", "leave", "abort", "update"]
CALLS: tuple[Call, ...] = ("init", "weight_needs", "status", "leave", "abort", "update")

_KEY = "weight_transfer"


@attrs.frozen
class Envelope:
    """One call to all workers of a vLLM engine.

    Attributes:
        call: which one; see the table in this module.
        data: JSON-safe; what the call takes.
        reply: where each worker answers.
    """

    call: Call
    data: dict[str, Any]
    reply: ReplyTo

    @classmethod
    def from_wire(cls, info: Mapping[str, Any]) -> Envelope:
        """Read what `to_wire` gave.

        Raises:
            ConfigError: it is something else, such as the init info of another trainer.
        """
        fields = info.get(_KEY)
        if not isinstance(fields, dict) or fields.keys() != {"call", "data", "reply"}:
            raise ConfigError(
                "This vLLM takes its weights through weight-transfer, and was called by something else; on the trainer "
                "use weight_transfer_vllm.VllmChannel."
            )
        call, data = fields["call"], fields["data"]
        if call not in CALLS or not isinstance(data, dict):
            raise ConfigError(
                f"The trainer's weight-transfer-vllm makes a call {call!r} that this one does not know; install the "
                "same version on both sides."
            )
        return cls(call, data, ReplyTo.from_wire(fields["reply"]))

    def to_wire(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return {_KEY: {"call": self.call, "data": self.data, "reply": self.reply.to_wire()}}
