"""A process group, and a mesh, of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@contextmanager
def lone_rank() -> Iterator[DeviceMesh]:
    """Have a mesh of one rank on the CPU in a ``with`` block.

    torch keeps meshes in a cache of the thread, and their groups with them. In a child that another thread forks the
    cache is destroyed, and gloo's group then waits for threads that are not there.
    """
    store = dist.HashStore()  # type: ignore[attr-defined]  # what it holds depends on the build
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
