"""Other ways than an engine's of bringing the same weights, which a benchmark sets beside it.

A scheme is written like a `weight_transfer.limit.Limit`, and a limit of another backend may be one. What makes it is
given by name, ``"module:function"``, and called in each process with a `SchemeSide`.
"""

from __future__ import annotations

from typing import Any

import attrs

from weight_transfer.limit import Limit, LimitSide


@attrs.frozen(kw_only=True)
class SchemeSide(LimitSide):
    """One process that takes part in a scheme.

    Attributes:
        process: a `weight_transfer.bench.member.Member`, which has the weights, and on a worker the engine.
    """

    process: Any


class Scheme(Limit):
    """One side of a scheme that brings the trainer's weights, so that their bits are compared before it is timed."""
