"""Whether tensors that are to be written one by one lie apart in memory, and in whose memory they lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import attrs
import torch

from weight_transfer.model.state import is_dense, memory_of


@attrs.frozen(eq=False)
class _Extent:
    """The bytes from a tensor's first to its last element."""

    name: str
    tensor: torch.Tensor
    begin: int
    end: int

    def holds(self, other: _Extent) -> bool:
        """Whether all elements of another one are its own; one with gaps holds itself only."""
        if self.tensor.device != other.tensor.device or not self.begin <= other.begin <= other.end <= self.end:
            return False
        return self.end - self.begin == self.tensor.nbytes or memory_of(self.tensor) == memory_of(other.tensor)


class Memory:
    """Which of some named tensors has certain bytes.

    Only plain tensors are looked at.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        found = [_extent(name, tensor) for name, tensor in tensors.items() if is_dense(tensor) and tensor.numel()]
        self._extents = sorted(found, key=lambda extent: extent.begin)
        self._begins = [extent.begin for extent in self._extents]
        self._reach = list(accumulate((extent.end for extent in self._extents), max))

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a tensor to which all elements of another one belong; None if there is none."""
        if not is_dense(tensor) or not tensor.numel():
            return None
        own = _extent("", tensor)
        index = bisect_right(self._begins, own.begin) - 1
        while index >= 0 and self._reach[index] >= own.end:
            if self._extents[index].holds(own):
                return self._extents[index].name
            index -= 1
        return None


def overlapping(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """Return the names of two tensors that share memory, or one name twice if its own elements do; None if none do.

    Only plain tensors are looked at.
    """
    extents = [_extent(name, tensor) for name, tensor in tensors.items() if is_dense(tensor) and tensor.numel()]
    for extent in extents:
        if _folds(extent.tensor):
            return extent.name, extent.name
    for group in _touching(extents):
        found = _shared(group)
        if found is not None:
            return found
    return None


def _extent(name: str, tensor: torch.Tensor) -> _Extent:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return _Extent(name, tensor, begin, begin + (reach + 1) * tensor.element_size())


def _folds(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor may be one, as after ``expand``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _touching(extents: Sequence[_Extent]) -> Iterator[list[_Extent]]:
    """Yield groups of several extents that overlap, one by one; strided tensors may still lie between each other."""
    group: list[_Extent] = []
    end = 0
    for extent in sorted(extents, key=lambda extent: (str(extent.tensor.device), extent.begin)):
        if group and extent.tensor.device == group[0].tensor.device and extent.begin < end:
            group.append(extent)
            end = max(end, extent.end)
            continue
        if len(group) > 1:
            yield group
        group, end = [extent], extent.end
    if len(group) > 1:
        yield group


def _shared(group: Sequence[_Extent]) -> tuple[str, str] | None:
    """Mark the bytes of each on a map, and see whether another one had them."""
    begin = group[0].begin
    owners = torch.zeros(max(extent.end for extent in group) - begin, dtype=torch.int32)
    for number, extent in enumerate(group, 1):
        size = extent.tensor.element_size()
        strides = [stride * size for stride in extent.tensor.stride()]
        own = owners.as_strided((*extent.tensor.shape, size), (*strides, 1), extent.begin - begin)
        owner = int(own.max())
        if owner:
            return group[owner - 1].name, extent.name
        own.fill_(number)
    return None
