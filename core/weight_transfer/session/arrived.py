"""What a worker notes of the bytes of one update, for the trainer to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.memory.digest_table import DigestTable
from weight_transfer.memory.integrity import Digester
from weight_transfer.session.landed import Landed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from weight_transfer.copying.host import HostCopies
    from weight_transfer.memory.gpu_copies import WeightCopies
    from weight_transfer.memory.gpu_digests import Geometry
    from weight_transfer.model.info import WeightTransferUpdateInfo
    from weight_transfer.model.loading import WeightLoader, Weights
    from weight_transfer.session.keeping import Arrivals


class Arrived:
    """Digests of what arrives, taken as it arrives.

    Args:
        info: the update, which says what is compared.
        arrivals: what comes by region; None if all comes whole.
        loader: which has begun.
        geometry: see `Digester`.

    Raises:
        ConfigError: what is loaded is to be read back, and cannot be.
    """

    def __init__(
        self, info: WeightTransferUpdateInfo, arrivals: Arrivals | None, loader: WeightLoader, geometry: Geometry
    ) -> None:
        whole = info.manifest if arrivals is None else arrivals.layout.whole
        self._left = dict(whole.numbers)
        self._whole = Digester(len(whole.params), geometry)
        self._arrivals = arrivals
        self._tables: list[str] = []
        self._landed = Landed(loader, info.manifest, whole, geometry) if info.verify == "loaded" else None

    def take(self, weights: Weights, *, in_place: bool = False) -> None:
        """Take weights that arrived whole, before they are loaded.

        Args:
            weights: by name.
            in_place: they are the worker's own tensors, and nobody writes there until the loader finishes.

        Raises:
            ManifestMismatchError: one has arrived before, or does not come whole.
        """
        if self._landed is not None:
            self._landed.take(weights)
        numbers = self._numbers([name for name, _ in weights])
        (self._whole.gather if in_place else self._whole.add)(numbers, [tensor for _, tensor in weights])

    def take_written(self, names: Iterable[str], destinations: Mapping[str, Tensor]) -> None:
        """Take weights that have been written into the worker's own tensors."""
        self.take([(name, destinations[name]) for name in names], in_place=True)

    def copy(self, copies: HostCopies | WeightCopies, names: Sequence[str], destinations: Mapping[str, Tensor]) -> None:
        """Run copies into the worker's own tensors, and take what they bring: whole weights, in the order of names."""
        self._whole.copy(self._numbers(names), copies)
        if self._landed is not None:
            self._landed.take([(name, destinations[name]) for name in names])

    def take_left(self, destinations: Mapping[str, Tensor]) -> None:
        """Take all others that have been written there."""
        self.take_written(list(self._left), destinations)

    def end(self) -> None:
        """Everything has arrived, and the loader has not finished: take what came by region."""
        if self._landed is not None and self._arrivals is not None:
            self._landed.take_regions()  # before what the trainer compares: so whoever writes in between is found
        self._tables = [DigestTable.of(self._whole.digests()).to_text()]
        if self._arrivals is None:
            return
        pieces, digests = self._arrivals.pieces, self._arrivals.reading.digests()
        for rank in range(len(self._arrivals.planned)):
            own = digests[pieces.rank == rank]
            self._tables.append(DigestTable.of(own).to_text() if len(own) else "")

    @property
    def reads_back(self) -> bool:
        """Whether what is loaded is to be read back."""
        return self._landed is not None

    def read_back(self) -> None:
        """The loader has finished: see that what has arrived lies in the model.

        Raises:
            IntegrityError: something else does.
        """
        assert self._landed is not None
        self._landed.require(self._whole.digests())

    @property
    def tables(self) -> tuple[str, ...]:
        """See `Receipt`."""
        return tuple(self._tables)

    def _numbers(self, names: Sequence[str]) -> list[int]:
        try:
            return list(map(self._left.pop, names))
        except KeyError as error:
            name = error.args[0]
            raise ManifestMismatchError(
                f"Parameter {name!r} arrived twice or is not in the manifest.", phase="update"
            ) from error
