"""What sweeps send: the same bytes in more and more tensors, or more and more bytes in as many."""

from __future__ import annotations

from collections.abc import Iterator

from weight_transfer.bench.architectures import ITEMSIZE, Shapes
from weight_transfer.bench.configurations import ModelShape

OVER = ("tensors", "bytes")

_TENSORS = (1, 10, 100, 1000, 10_000)
_ALL_BYTES = {"cpu": 32_000_000, "cuda": 1_000_000_000}  # in how many tensors soever
_BYTES = {"cpu": (10**5, 10**6, 10**7, 10**8), "cuda": (10**6, 10**7, 10**8, 10**9, 10**10)}
_MIDDLE = 100  # tensors, of how many bytes soever


def points_of(over: str, device: str) -> Iterator[ModelShape]:
    """Yield what is sent, in rising order.

    Args:
        over: what changes, one of `OVER`.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if over == "tensors":
        for count in _TENSORS:
            yield alike(count, _ALL_BYTES[device] // count)
    else:
        for nbytes in _BYTES[device]:
            yield alike(_MIDDLE, nbytes // _MIDDLE)


def alike(count: int, nbytes: int) -> ModelShape:
    """Return a model of one layer with ``count`` vectors of ``nbytes`` bytes each."""
    shapes: Shapes = {f"model.layers.0.vectors.{number}.weight": (nbytes // ITEMSIZE,) for number in range(count)}
    return ModelShape(name=f"{count:,} tensors", shapes=shapes, layers=1, published_layers=1, width=1)
