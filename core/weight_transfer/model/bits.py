"""Tensors as integers of the same size: on CUDA, a batched copy of floats changes the bits of NaNs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element. complex128 has none."""


def as_bits(tensor: Tensor) -> Tensor:
    """Return a tensor as `INTEGERS`, over the same memory; itself if there are none of its size."""
    integers = INTEGERS.get(tensor.element_size())
    return tensor if integers is None else tensor.view(integers)
