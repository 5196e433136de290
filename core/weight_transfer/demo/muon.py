"""The optimizer Muon in float32.

torch's own (2.9 and later) multiplies its matrices in bfloat16, which is emulated on a processor without AVX-512: there
each step of the demo took as long as thirty do now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Keller Jordan's, as in torch.optim.Muon
_ITERATIONS = 4
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Moves each weight matrix along its momentum with all singular values brought near one.

    Args:
        parameters: float32 matrices.
        lr: learning rate.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure
        """Move the matrices by what their gradients say."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"]
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                rows, columns = matrix.shape
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                matrix.sub_(_orthogonalised(matrix.grad.lerp(momentum, _MOMENTUM)), alpha=rate)


def _orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with singular values between about 0.5 and 1.5, by Newton-Schulz iterations."""
    first, third, fifth = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.T if is_tall else x
