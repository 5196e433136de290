"""What a trainer rank notes of the bytes that it sends in one update."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from weight_transfer.memory.digest_table import DigestTable
from weight_transfer.memory.integrity import Digester
from weight_transfer.model.autograd_modes import reading
from weight_transfer.model.manifest import torch_dtype

if TYPE_CHECKING:
    from weight_transfer.memory.gpu_digests import Geometry
    from weight_transfer.model.manifest import Manifest

_SOME = 64 * 2**20  # bytes that are digested between two looks at whether to stop, about


class Sent:
    """Digests of what goes whole, taken while it is sent.

    What stays where it is (`WeightSource.resident`) is digested beside the engine's work: on a stream of its own on a
    GPU, on a thread on the CPU. Whatever else the source yields is digested as it passes to the engine, and what the
    engine reads in another dtype (`WeightSource.masters`) once all has been sent.

    Args:
        manifest: of what goes whole.
        geometry: see `Digester`.
    """

    def __init__(self, manifest: Manifest, geometry: Geometry) -> None:
        self._manifest = manifest
        self._digester = Digester(len(manifest.params), geometry)
        self._passing = Digester(len(manifest.params))  # of temporary tensors, which lie elsewhere next time
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
        taken = [(self._left.pop(name), tensor) for name, tensor in resident.items() if name in self._left]
        on_gpus = [(number, tensor) for number, tensor in taken if tensor.is_cuda]
        on_host = [(number, tensor) for number, tensor in taken if not tensor.is_cuda]
        self._digester.add([number for number, _ in on_gpus], [tensor for _, tensor in on_gpus], beside=True)
        try:
            with _on_thread(self._digester, on_host, go_on):
                yield
        finally:
            self._digester.hold_up()
        for name in [name for name in masters if name in self._left]:
            go_on()
            number = self._left.pop(name)
            self._digester.add([number], [masters[name]], [torch_dtype(self._manifest.params[number].dtype)])

    def passes(self, name: str, tensor: torch.Tensor) -> None:
        """Take what the source yields to the engine, unless it is resident."""
        if name in self._left:
            self._passing.add([self._left.pop(name)], [tensor])

    def table(self) -> str:
        """Return the `DigestTable` of all weights, as text."""
        return DigestTable.of(self._digester.digests() | self._passing.digests()).to_text()


Numbered = Sequence[tuple[int, torch.Tensor]]


def _parts(tensors: Numbered) -> Iterator[Numbered]:
    """Cut them into parts of some bytes each, or of one that is larger."""
    part: list[tuple[int, torch.Tensor]] = []
    nbytes = 0
    for each in tensors:
        part.append(each)
        nbytes += each[1].nbytes
        if nbytes >= _SOME:
            yield part
            part, nbytes = [], 0
    yield part


@contextmanager
def _on_thread(digester: Digester, tensors: Numbered, go_on: Callable[[], None]) -> Iterator[None]:
    """Digest tensors in host memory on a thread, which has ended when the block has."""
    stopped = threading.Event()

    def take() -> None:
        with reading():
            for some in _parts(tensors):
                if stopped.is_set():
                    return
                go_on()
                digester.add([number for number, _ in some], [tensor for _, tensor in some])

    with ThreadPoolExecutor(1, thread_name_prefix="weight-transfer digests") as pool:
        taking = pool.submit(take) if tensors else None
        try:
            yield
            if taking is not None:
                taking.result()
        except BaseException:
            stopped.set()
            raise
