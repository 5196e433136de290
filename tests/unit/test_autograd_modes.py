"""Neither side minds in which of torch's modes it is called, or in which its model was built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weight_transfer import WeightReceiver, WeightSender
from weight_transfer.testing.models import hashes

CONFIG = {"backend": "loopback", "timeout": 20, "verify": "wire"}


class OfItsOwn(nn.Linear):
    """Replaces its weights by what a loader makes of them."""

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            getattr(self, name).copy_(tensor)


@pytest.mark.parametrize("kind", [nn.Linear, OfItsOwn])
@pytest.mark.parametrize("built_inside", [False, True])
def test_connecting_and_sending_alternate_between_modes(kind: type[nn.Linear], built_inside: bool) -> None:
    with torch.inference_mode(built_inside):
        target = kind(30, 20)
    model = nn.Linear(30, 20)
    with WeightReceiver(CONFIG, target) as receiver, WeightSender(CONFIG, [receiver]) as sender:
        with torch.inference_mode():
            sender.connect()
        for version, inside in enumerate((True, False, True)):
            nn.init.normal_(model.weight)
            with torch.inference_mode(inside):
                sender.send(model)
                assert torch.is_inference_mode_enabled() is inside
            assert receiver.version == version
            assert hashes(target) == hashes(model)
    assert target.weight.is_inference() is built_inside
    assert not model.weight.is_inference()
    assert torch.is_grad_enabled()
