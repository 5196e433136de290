"""The links of a backend on this machine: updates from one process to another, whose bits are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.bench.member import Scene
from weight_transfer.bench.parts import Parts
from weight_transfer.bench.sweeping import alike
from weight_transfer.bench.troupe import VERSIONS, Troupe
from weight_transfer.config.structuring import unstructure
from weight_transfer.errors import HandshakeError, WeightTransferError
from weight_transfer.machine.nvml import find_gpus
from weight_transfer.plugins.backend import Capability
from weight_transfer.plugins.manager import load_backend

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig

_TENSORS = 16
_PATIENCE = 120.0  # seconds of one step


@attrs.frozen(kw_only=True)
class Link:
    """What was measured between a trainer and a worker.

    Attributes:
        backend: its name.
        trainer: device of the trainer's weights.
        worker: device of the worker's.
        gbps: GB/s (10**9 bytes) of the fastest update; 0 if none was right.
        transport: how the bytes travelled, as far as the backend tells.
        warnings: of the reports.
        error: a sentence if an update failed, or other bytes arrived.
        refused: a sentence if the backend does not connect these two, such as one process with another on one GPU.
    """

    backend: str
    trainer: str
    worker: str
    gbps: float = 0.0
    transport: str = ""
    warnings: Sequence[str] = ()
    error: str | None = None
    refused: str | None = None


def links(backend: str) -> Iterator[tuple[str, str]]:
    """Yield the devices of trainer and worker of each link that the backend has on this machine.

    That is host memory, one GPU, and each two GPUs that torch sees, in one direction.
    """
    descriptor = load_backend(backend).backend
    capabilities = descriptor.capabilities
    if Capability.CROSS_PROCESS not in capabilities:
        return
    if Capability.CPU in capabilities:
        yield "cpu", "cpu"
    if Capability.CUDA in capabilities and find_gpus().indices:
        import torch

        gpus = range(torch.cuda.device_count())
        if gpus and not descriptor.one_device_each:
            yield "cuda:0", "cuda:0"
        for first in gpus:
            for second in gpus[first + 1 :]:
                yield f"cuda:{first}", f"cuda:{second}"


def measure(config: WeightTransferConfig, trainer: str, worker: str, nbytes: int) -> Link:
    """Start two processes, send updates from one to the other, and compare the bytes of each.

    Args:
        config: of both sides.
        trainer: device of the trainer's weights.
        worker: device of the worker's.
        nbytes: of one update, about.
    """
    link = Link(backend=config.backend, trainer=trainer, worker=worker)
    shapes = alike(_TENSORS, nbytes // _TENSORS).shapes
    beside = 0 if trainer == worker != "cpu" else None
    parts = Parts(shapes=shapes, trainers=1, shards=1, workers=1, shares=1, beside=[beside])
    bare = {**unstructure(config), "verify": "none"}  # the bits are compared here
    scene = Scene(parts=parts, config=bare, trainers=[trainer], workers=[worker])

    def send() -> None:
        nonlocal link
        told = troupe.send("send")
        link = attrs.evolve(
            link,
            gbps=max(link.gbps, told["gbps"]),
            transport=", ".join(told["transports"].values()),
            warnings=told["warnings"],
        )

    try:
        with Troupe(scene, _PATIENCE) as troupe:
            troupe.connect()
            for version in VERSIONS:
                troupe.bring(version, send)
    except HandshakeError as error:
        return attrs.evolve(link, refused=str(error))
    except (WeightTransferError, AssertionError) as error:  # an actor that dies or hangs is an AssertionError
        return attrs.evolve(link, gbps=0.0, error=str(error))
    return link
