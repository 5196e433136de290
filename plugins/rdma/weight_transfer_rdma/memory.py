"""What host and device memory have in common, as the engines see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import attrs
import torch

from weight_transfer_rdma.nixl import WHOLE
from weight_transfer_rdma.plan import Integers, Regions

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, Manifest
    from weight_transfer_rdma.config import RdmaOptions
    from weight_transfer_rdma.nixl import Place, Rows, Transport


@attrs.frozen(eq=False)
class Located:
    """Where an agent finds tensors, as columns in the manifest's order.

    Attributes:
        addresses: -1 for those that it cannot reach or that are not contiguous.
        padding: bytes behind the tensor's end that belong to nobody, whatever is sent.
        regions: the regions in which they lie.
    """

    addresses: Integers
    padding: Integers
    regions: Regions


@attrs.frozen(eq=False)
class Arena:
    """Staging memory: the same bytes, uint8, here and at an address of the agent."""

    data: torch.Tensor
    address: int


class RunningAgent(Protocol):
    """A NIXL agent as an engine sees it; `AgentProcess` says what each method does."""

    name: str

    @property
    def alive(self) -> bool: ...
    def metadata(self, deadline: Deadline) -> bytes: ...
    def connect(
        self, metadata: bytes, deadline: Deadline, replaced: str | None = None, label: str | None = None
    ) -> str: ...
    def prepare(
        self,
        operation: str,
        peer: str,
        rows: Rows,
        local: Place,
        remote: Place,
        deadline: Deadline,
        plan: str = WHOLE,
    ) -> int: ...
    def release(self, deadline: Deadline, plan: str = WHOLE) -> None: ...
    def attach_flags(self, peer: str, filled: int, loaded: int, deadline: Deadline, plan: str = WHOLE) -> None: ...
    def start(self, handle: int, bucket: int, deadline: Deadline) -> None: ...
    def finish(self, deadline: Deadline) -> None: ...
    def transport(self, place: Place) -> Transport: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class Memory(Protocol):
    """One side's weights and staging memory, and the agent that reaches them.

    Attributes:
        place: where the weights lie.
        moved: whether the last `locate` has moved tensors: what was known of their places before it is old.
    """

    place: Place
    moved: bool

    def start_agent(self, name: str, peer: str, reads: bool, deadline: Deadline) -> RunningAgent:
        """Start an agent that reads, or one that is read from; the methods below speak of the last one."""

    def locate(
        self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], deadline: Deadline, plan: str = WHOLE
    ) -> Located:
        """Let the agent at the tensors of a manifest; return the same object while nothing moved.

        What it was let at for another plan stays.
        """

    @property
    def parted(self) -> bool:
        """Whether a fork has parted this process's tensors from what the agent reaches, since `locate`."""

    def arena(self, nbytes: int, deadline: Deadline) -> Arena:
        """Make staging memory where the weights lie."""

    def free(self, arena: Arena, deadline: Deadline) -> None:
        """Give staging memory back."""

    def words(self, nbytes: int, deadline: Deadline) -> Arena:
        """Make zeroed host memory."""

    def settle(self) -> None:
        """Wait until memory is as all operations so far leave it."""

    def settle_copies(self) -> None:
        """Wait until the copies of the current stream have ended."""

    def close(self) -> None:
        """Let go of the weights."""


def memory_for(device: str | None, options: RdmaOptions) -> Memory:
    """Return the memory of a torch device.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device.
    """
    chosen = torch.device(device or "cpu")
    if chosen.type == "cpu":
        from weight_transfer_rdma.host import HostMemory

        return HostMemory(options)
    if chosen.type == "cuda":
        from weight_transfer_rdma.device import DeviceMemory

        return DeviceMemory(options, chosen)
    raise ValueError(f"rdma moves CPU and CUDA tensors, not those of {chosen}")
