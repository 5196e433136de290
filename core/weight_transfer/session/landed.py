"""Whether the bytes that a worker's loader was to write lie in the model once it has finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weight_transfer.errors import ConfigError, IntegrityError
from weight_transfer.memory.integrity import Digester
from weight_transfer.model.abilities import offers
from weight_transfer.model.loading import ReadableLoader
from weight_transfer.model.regions import Region
from weight_transfer.model.targets import NO_TARGETS

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.memory.chunks import Words
    from weight_transfer.memory.gpu_digests import Geometry
    from weight_transfer.model.loading import WeightLoader, Weights
    from weight_transfer.model.manifest import Manifest


class Landed:
    """Digests of what is to lie in the model, and of what lies there.

    Args:
        loader: which has begun.
        manifest: all weights of the update.
        whole: those that come whole.
        geometry: see `Digester`.

    Raises:
        ConfigError: the loader cannot say where a weight lies once it is loaded; it is named.
    """

    def __init__(self, loader: WeightLoader, manifest: Manifest, whole: Manifest, geometry: Geometry) -> None:
        places = loader.landed(manifest) if offers(loader, ReadableLoader) else NO_TARGETS
        hidden = next((param.name for param in manifest.params if param.name not in places), None)
        if hidden is not None:
            raise ConfigError(
                f"verify = 'loaded' reads weights back, but the loader of this worker does not keep {hidden!r} as it "
                "is sent, or does not say where; set verify = 'wire' on the trainer."
            )
        self._whole = whole
        self._rows = [(param.name, target) for param in manifest.params for target in places[param.name]]
        self._rows_of: dict[str, list[int]] = {}
        for row, (name, _) in enumerate(self._rows):
            self._rows_of.setdefault(name, []).append(row)
        self._geometry = geometry
        self._expected = Digester(len(self._rows), geometry)
        self._as_arrived: list[tuple[int, int]] = []

    def take(self, weights: Weights) -> None:
        """Take weights as they arrive whole, before they are loaded."""
        rows: list[int] = []
        parts: list[Tensor] = []
        for name, tensor in weights:
            for row in self._rows_of.get(name, ()):
                region = self._rows[row][1].region
                if region == Region.whole(tensor.shape):
                    self._as_arrived.append((row, self._whole.numbers[name]))
                else:
                    rows.append(row)
                    parts.append(tensor[region.slices])
        self._expected.add(rows, parts)

    def take_regions(self) -> None:
        """Take what has come by region into its targets, before the loader finishes."""
        rows: list[int] = []
        tensors: list[Tensor] = []
        first: dict[tuple[str, Region], Tensor] = {}  # of several targets of one region the others are filled later
        for row, (name, target) in enumerate(self._rows):
            if name not in self._whole.by_name:
                rows.append(row)
                tensors.append(first.setdefault((name, target.region), target.tensor))
        self._expected.add(rows, tensors)

    def require(self, arrived: Words) -> None:
        """Read back what lies in the model.

        Args:
            arrived: the digests of what arrived whole, by number.

        Raises:
            IntegrityError: it is something else; the first weight is named.
        """
        expected = self._expected.digests()
        for row, number in self._as_arrived:
            expected[row] = arrived[number]
        found = Digester(len(self._rows), self._geometry)
        found.add(range(len(self._rows)), [target.tensor for _, target in self._rows])
        unlike = np.flatnonzero(found.digests() != expected)
        if len(unlike):
            row = int(unlike[0])
            name = self._rows[row][0]
            raise IntegrityError(
                f"Parameter {name!r} lies in the worker's model with other bytes than arrived: its loader has written "
                "others, or somebody else has.",
                phase="update",
                param=name,
                expected=f"{expected[row]:016x}",
                got=f"{found.digests()[row]:016x}",
            )
