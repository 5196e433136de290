"""What the trainer tells the workers: where to connect, and where the weights lie."""

from __future__ import annotations

import attrs

from weight_transfer.authoring import Export, WeightTransferInitInfo, WeightTransferUpdateInfo, sent_once
from weight_transfer_ipc.ring import RingLayout


@attrs.frozen(kw_only=True)
class IpcInitInfo(WeightTransferInitInfo):
    """Where to connect.

    Attributes:
        address: abstract Unix address of the trainer's socket.
        token: what to show there.
        gpu: UUID of the GPU on which the weights lie, as hexadecimal text; None if they lie in host memory.
    """

    address: str
    token: str = attrs.field(repr=False)
    gpu: str | None = None


@attrs.frozen
class Allocation:
    """A piece of device memory that the trainer exports.

    Attributes:
        id: the segment's id in the table of addresses.
        gpu: UUID of the GPU on which it lies, as hexadecimal text.
        nbytes: its size.
        handle: CUDA's handle, 64 bytes as hexadecimal text.
        address: of its first byte in the trainer; for a worker in the same process, which cannot open the handle.
    """

    id: int
    gpu: str
    nbytes: int
    handle: str
    address: int


@attrs.frozen
class DeviceMemory:
    """The trainer's device memory.

    Attributes:
        allocations: exported memory, the ring's included.
        ready: an interprocess event by GPU, handle as hexadecimal text: when it has happened, the weights may be read.
    """

    allocations: tuple[Allocation, ...]
    ready: dict[str, str]


@attrs.frozen(kw_only=True)
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are.

    Attributes:
        export: the exported parameters.
        device_memory: the memory behind the export's segments, if it is a GPU's; host memory goes over the socket.
        ring: the ring for the staged ones, if there are any.
        keep_mapped: whether the worker keeps the memory mapped until the next update.
    """

    export: Export = sent_once()
    device_memory: DeviceMemory | None = sent_once(default=None)
    ring: RingLayout | None = None
    keep_mapped: bool = True
