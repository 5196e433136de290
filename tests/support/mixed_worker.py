"""A worker process with bfloat16 weights and fp32 routers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import weight_transfer as wt
from support.mixed import Mixed
from weight_transfer.testing.models import digest, randomise

if TYPE_CHECKING:
    from support.actors import Stage


def main(stage: Stage, config: dict[str, Any], in_place: bool, device: str = "cpu") -> None:
    """Serve; unless ``in_place``, a loader of the model's own copies the weights."""
    torch.set_num_threads(1)
    model = Mixed(torch.bfloat16).to(device)
    randomise(model, 77)

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in weights:
            with torch.no_grad():
                targets[name].copy_(tensor)

    with (
        wt.WeightReceiver(config, model, load_weights=None if in_place else load) as receiver,
        wt.serve(receiver) as server,
    ):
        stage.say(server.url)
        stage.serve({"digest": lambda: digest(model), "version": lambda: receiver.version})
