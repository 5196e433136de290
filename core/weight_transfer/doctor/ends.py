"""The two processes between which a link is measured: actors of `weight_transfer.testing`, each with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_transfer.control.http_server import serve
from weight_transfer.session.receiver import WeightReceiver
from weight_transfer.session.sender import WeightSender
from weight_transfer.testing.models import Model, digest, randomise, weight

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage

_WEIGHTS = 16
_COLUMNS = 1024


def main(stage: Stage, config: dict[str, Any], device: str, nbytes: int, worker: str | None = None) -> None:
    """Play the trainer of ``worker``, a URL, or without one the worker.

    Args:
        stage: where commands come from.
        config: of both sides.
        device: of the model.
        nbytes: of the model, about.
        worker: URL.
    """
    rows = max(1, nbytes // (_WEIGHTS * _COLUMNS * 2))
    model = Model((weight(f"layer{index}", "bfloat16", rows, _COLUMNS) for index in range(_WEIGHTS)), 0, device)
    if worker is None:
        with WeightReceiver(config, model) as receiver, serve(receiver) as server:
            stage.say(server.url)
            stage.serve({"digest": lambda: digest(model)})
        return

    with WeightSender(config, [worker]) as sender:

        def send(seed: int) -> dict[str, Any]:
            randomise(model, seed)
            report = sender.send(model)
            return {
                "gbps": report.gbps,
                "transports": list(report.transports.values()),
                "warnings": list(report.warnings),
                "digest": digest(model),
            }

        stage.say("ready")
        stage.serve({"send": send})
