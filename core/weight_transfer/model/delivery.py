"""What becomes of the weights that a loader is given at once: planned once for each set of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.model.copies import make_copies
from weight_transfer.model.kernel_copies import KernelCopies

if TYPE_CHECKING:
    from weight_transfer.model.copies import Landing, Move, Sources


_TOGETHER = 256 * 2**20
"""Bytes from which on copies of several layers are not made together: only then the layers end, which hold memory."""


class Step:
    """Copies that are made together, into some layers.

    Args:
        copies: numbers of weights of the delivery, and what is copied of them.

    Attributes:
        counts: how many go into each layer.
    """

    def __init__(self, copies: Sequence[tuple[int, Move]]) -> None:
        self._copies = copies
        self._by_kernel: KernelCopies | None = None
        self._rest: tuple[frozenset[int], Step] = frozenset(), self
        self.counts: Mapping[str, int] = Counter(move.layer for _, move in copies)

    def without(self, written: frozenset[int]) -> Step:
        """Return it without the weights of these numbers; the same object as the last time if they are the same."""
        if self._rest[0] != written:
            left = [pair for pair in self._copies if pair[0] not in written]
            self._rest = written, self if len(left) == len(self._copies) else Step(left)
        return self._rest[1]

    def make(self, landings: Mapping[str, Landing], sources: Sources) -> None:
        """Make the copies, by a kernel where it can.

        Args:
            landings: by layer.
            sources: the delivery.
        """
        if KernelCopies.are_possible([landings[layer] for layer in self.counts], sources):
            if self._by_kernel is None:
                self._by_kernel = KernelCopies(self._copies)
            self._by_kernel.make(landings, sources)
        else:
            make_copies(self._copies, landings, sources)


@attrs.frozen(eq=False)
class Delivery:
    """Weights that come together.

    Attributes:
        steps: the copies, layer by layer; small layers share a step.
        others: numbers of the weights that the model's own loader takes.
    """

    steps: Sequence[Step]
    others: Sequence[int]

    @classmethod
    def of(cls, names: Sequence[str], copies: Mapping[str, Sequence[Move]], by_loader: Collection[str]) -> Delivery:
        """Plan a delivery.

        Args:
            names: of the weights.
            copies: by name, of those that are copied.
            by_loader: names of those that the model's own loader takes.
        """
        layers: dict[str, list[tuple[int, Move]]] = {}
        for number, name in enumerate(names):
            for move in () if name in by_loader else copies.get(name, ()):
                layers.setdefault(move.layer, []).append((number, move))
        others = [number for number, name in enumerate(names) if name in by_loader]
        return cls([Step(own) for own in _together(layers.values())], others)


def _together(layers: Iterable[list[tuple[int, Move]]]) -> Iterator[list[tuple[int, Move]]]:
    step: list[tuple[int, Move]] = []
    nbytes = 0
    for own in layers:
        step += own
        nbytes += sum(move.copy.to.numel * move.itemsize for _, move in own)
        if nbytes >= _TOGETHER:
            yield step
            step, nbytes = [], 0
    if step:
        yield step
