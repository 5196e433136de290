"""Other ways than an engine's of bringing the same weights, which a benchmark sets beside it.

A scheme is written like a `weight_transfer.limit.Limit`, and a limit of another backend may be one. What makes it is
given by name, ``"module:function"``, and called in each process with a `SchemeSide`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from weight_transfer.limit import Limit, LimitSide


@attrs.frozen(kw_only=True)
class SchemeSide(LimitSide):
    """One process that takes part in a scheme.

    Attributes:
        weights: returns this process's tensors by the names of the weights that they are, or are parts of.
        engine: returns a worker's engine, which has made an update; None on a trainer rank.
    """

    weights: Callable[[], Mapping[str, torch.Tensor]]
    engine: Callable[[], Any]


class Scheme(Limit):
    """One side of a scheme that brings the trainer's weights, so that their bits are compared before it is timed."""

    side: SchemeSide
