"""The bytes of tensors, cut as a plan says: of tensors that stay in place, and of tensors that are made on the way."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.buckets import Slot, as_bytes

if TYPE_CHECKING:
    import torch

    from weight_transfer.source import WeightSource

_address = operator.methodcaller("data_ptr")
_strides = operator.methodcaller("stride")


class ResidentBytes:
    """The bytes of tensors that stay where they are: looked up once, not at every update.

    It keeps their memory alive, so that an address always means the same tensor; one that was reallocated lets go of
    its old memory at the next update.

    Args:
        tensors: in the order of the plan's manifest.
        device: tensors elsewhere, and those that are not contiguous, have no bytes here.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        tensors = list(tensors)
        self._addresses = list(map(_address, tensors))
        self._all_strides = list(map(_strides, tensors))
        self._bytes = [as_bytes(t) if t.device == device and t.is_contiguous() else None for t in tensors]

    @property
    def complete(self) -> bool:
        """Whether all tensors have bytes here."""
        return all(data is not None for data in self._bytes)

    def still_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors, of the same shapes, lie where those that it was made of lay."""
        return (
            len(tensors) == len(self._addresses)
            and _all_equal(map(_address, tensors), self._addresses)
            and _all_equal(map(_strides, tensors), self._all_strides)
        )

    def piece(self, slot: Slot) -> torch.Tensor | None:
        """Return the bytes of a slot, uint8 of shape ``[slot.nbytes]``."""
        data = self._bytes[slot.param]
        return None if data is None else data[slot.start : slot.start + slot.nbytes]


class StreamedBytes:
    """The bytes of a source that is iterated: a tensor is kept until its last byte was asked for."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(source)
        self._device = device
        self._held: dict[int, torch.Tensor] = {}
        self._read = 0

    def pieces(self, slots: Sequence[Slot]) -> list[torch.Tensor]:
        """Return the bytes of each slot, uint8."""
        pieces = []
        for slot in slots:
            while self._read <= slot.param:
                _, tensor = next(self._tensors)
                self._held[self._read] = as_bytes(tensor.to(self._device).contiguous())
                self._read += 1
            pieces.append(self._held[slot.param][slot.start : slot.start + slot.nbytes])
            if slot.last:
                del self._held[slot.param]
        return pieces


def _all_equal(found: Iterable[Any], expected: Iterable[Any]) -> bool:
    return all(map(operator.eq, found, expected))
