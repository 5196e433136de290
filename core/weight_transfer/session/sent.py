"""What a trainer rank notes of the bytes that it sends in one update."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Self

import attrs
import torch

from weight_transfer.memory.digest_table import DigestTable
from weight_transfer.memory.gpu_digests import GpuReading
from weight_transfer.memory.host_digests import HostReading
from weight_transfer.memory.integrity import Digester, read_on_gpus
from weight_transfer.model.autograd_modes import reading
from weight_transfer.model.manifest import torch_dtype

if TYPE_CHECKING:
    from weight_transfer.memory.chunks import Words
    from weight_transfer.model.manifest import Manifest


@attrs.frozen(eq=False)
class _Resident:
    """The weights that stay where they are, ready to be digested.

    Attributes:
        on_gpus: what reads those on GPUs where they lie.
        laid_out: the tensors on GPUs that have to be laid out first, by number.
        on_host: the numbers of the others.
        reading: reads these.
        left: the numbers of the weights that are not among them, by name.
    """

    on_gpus: list[tuple[list[int], GpuReading]]
    laid_out: dict[int, torch.Tensor]
    on_host: list[int]
    reading: HostReading
    left: dict[str, int]

    @classmethod
    def of(cls, manifest: Manifest, resident: Mapping[str, torch.Tensor]) -> Self:
        taken = {manifest.numbers[name]: tensor for name, tensor in resident.items() if name in manifest.numbers}
        on_gpus, others = read_on_gpus({number: (tensor, tensor.dtype) for number, tensor in taken.items()})
        laid_out = {number: taken[number] for number in others if taken[number].is_cuda}
        on_host = [number for number in others if number not in laid_out]
        reading = HostReading([(taken[number], taken[number].dtype) for number in on_host])
        left = {name: number for name, number in manifest.numbers.items() if number not in taken}
        return cls(on_gpus, laid_out, on_host, reading, left)


class Residents:
    """What was worked out of the places of a source's weights, kept as long as that says that they lie there."""

    def __init__(self) -> None:
        self._known: tuple[Manifest, Mapping[str, torch.Tensor], _Resident] | None = None

    def of(self, manifest: Manifest, resident: Mapping[str, torch.Tensor]) -> _Resident:
        """Return the weights of a manifest that are `WeightSource.resident`; the same for the same two objects."""
        known = self._known
        if known is None or known[0] is not manifest or known[1] is not resident:
            self._known = known = manifest, resident, _Resident.of(manifest, resident)
        return known[2]


class Sent:
    """Digests of what goes whole, taken while it is sent.

    What stays where it is (`WeightSource.resident`) is digested beside the engine's work: on a stream of its own on a
    GPU, on a thread on the CPU. Whatever else the source yields is digested as it passes to the engine, and what the
    engine reads in another dtype (`WeightSource.masters`) once all has been sent.

    Args:
        manifest: of what goes whole.
        residents: of the target that this is for.
    """

    def __init__(self, manifest: Manifest, residents: Residents) -> None:
        self._manifest = manifest
        self._residents = residents
        self._digester = Digester(len(manifest.params))
        self._left = dict(manifest.numbers)

    @contextmanager
    def beside(
        self,
        resident: Mapping[str, torch.Tensor],
        masters: Mapping[str, torch.Tensor],
        go_on: Callable[[], None],
    ) -> Iterator[None]:
        """Take what the engine sends inside a ``with`` block. After an error nothing reads the weights any more.

        Args:
            resident: the source's.
            masters: the source's.
            go_on: is asked again and again, on any thread, and raises to end it.
        """
        known = self._residents.of(self._manifest, resident)
        self._left = dict(known.left)
        self._digester.add(list(known.laid_out), list(known.laid_out.values()))
        for numbers, tensors in known.on_gpus:
            self._digester.add_beside(numbers, tensors)
        try:
            with _on_thread(known.reading, go_on) if known.on_host else nullcontext() as found:
                yield
        finally:
            self._digester.hold_up()
        if found is not None:
            self._digester.put(known.on_host, found.result())
        for name in [name for name in masters if name in self._left]:
            go_on()
            number = self._left.pop(name)
            self._digester.add([number], [masters[name]], [torch_dtype(self._manifest.params[number].dtype)])

    def passes(self, name: str, tensor: torch.Tensor) -> None:
        """Take what the source yields to the engine, unless it is resident."""
        if name in self._left:
            self._digester.add([self._left.pop(name)], [tensor])

    def table(self) -> str:
        """Return the `DigestTable` of all weights, as text. Engines need not ask for those without elements."""
        empty = [number for number in self._left.values() if not self._manifest.params[number].nbytes]
        self._digester.add(empty, [torch.empty(0)] * len(empty))
        return DigestTable.of(self._digester.digests()).to_text()


@contextmanager
def _on_thread(tensors: HostReading, go_on: Callable[[], None]) -> Iterator[Future[Words]]:
    """Digest tensors in host memory on a thread, which has ended when the block has."""
    stopped = threading.Event()

    def look() -> None:
        if stopped.is_set():
            raise CancelledError
        go_on()

    def take() -> Words:
        with reading():
            return tensors.digests(look)

    with ThreadPoolExecutor(1, thread_name_prefix="weight-transfer digests") as pool:
        found = pool.submit(take)
        try:
            yield found
            found.result()
        except BaseException:
            stopped.set()
            raise
