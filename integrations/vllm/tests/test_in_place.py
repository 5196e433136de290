"""What may be written in place in a vLLM model is looked up again when something has changed, and only then.

Runs where vLLM is installed: ``make test-vllm``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from weight_transfer_vllm.in_place import TensorsInPlace


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(4)
        self.other = nn.Linear(4, 4)
        self.inner = nn.Sequential(RMSNorm(4), nn.Identity())


@pytest.fixture
def model() -> Model:
    with set_current_vllm_config(VllmConfig()):
        return Model()


def moved(model: Model) -> None:
    model.norm.weight.data = model.norm.weight.data.clone()


def put_in_another_form(model: Model) -> None:
    model.norm.weight.data = model.norm.weight.data.as_strided((2,), (2,))


def replaced(model: Model) -> None:
    model.norm.weight = nn.Parameter(model.norm.weight.data)


def another_module(model: Model) -> None:
    model.inner[0] = nn.Linear(2, 2)


def one_more_module(model: Model) -> None:
    with set_current_vllm_config(VllmConfig()):
        model.inner.append(RMSNorm(4))


def another_kernel(model: Model) -> None:
    model.norm.cpu_linear = torch.nn.functional.linear


def another_method(model: Model) -> None:
    model.norm.quant_method = object()


def test_tensors_are_the_same_object_while_nothing_changes(model: Model) -> None:
    tensors = TensorsInPlace(model)
    found = tensors.read()
    assert found.keys() == {"norm.weight", "inner.0.weight"}
    assert tensors.layers == {"norm", "inner.0"}
    model.norm.weight.data.fill_(3)
    model.other.weight.data = torch.zeros(4, 4)
    assert tensors.read() is found
    assert torch.equal(found["norm.weight"], model.norm.weight)


@pytest.mark.parametrize(
    "change",
    [moved, put_in_another_form, replaced, another_module, one_more_module, another_kernel, another_method],
)
def test_whatever_changes_is_seen(model: Model, change: Callable[[Model], None]) -> None:
    tensors = TensorsInPlace(model)
    before = tensors.read()
    change(model)
    after = tensors.read()
    assert after is not before
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == {
        f"{path}.weight": module.weight.data_ptr()
        for path, module in model.named_modules()
        if isinstance(module, RMSNorm)
    }
    assert tensors.layers == {name.removesuffix(".weight") for name in after}
    assert tensors.read() is after
