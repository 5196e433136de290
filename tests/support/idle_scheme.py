"""A scheme for benchmarks that says that it brings the weights, and moves nothing."""

from __future__ import annotations

from weight_transfer.bench.schemes import Scheme


class Idle(Scheme):
    """Returns at once."""

    what = "nothing"
