"""What matters to NCCL and gloo on this machine."""

from __future__ import annotations

from weight_transfer.authoring import (
    Check,
    Verdict,
    check_gpus,
    check_locked_memory,
    check_rdma_devices,
    check_shared_memory,
    check_torch,
    find_gpus,
)


def checks() -> list[Check]:
    """Look at torch's libraries, at GPUs, and at what NCCL takes between them."""
    return [
        check_torch(),
        _check_nccl(),
        check_gpus(),
        check_shared_memory(),
        check_rdma_devices(),
        check_locked_memory(),
    ]


def _check_nccl() -> Check:
    """Look whether there is an NCCL, and a GPU for each of two processes."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_nccl_available():
        found = "not in this torch build, so that only CPU tensors travel, over gloo"
        return Check(title="NCCL", verdict=Verdict.LIMITED, found=found)
    found = ".".join(map(str, torch.cuda.nccl.version()))
    if len(find_gpus().indices) < 2:
        found += "; it needs a GPU for each process, and here are fewer than two"
        return Check(title="NCCL", verdict=Verdict.LIMITED, found=found, fix="Use ipc between processes on one GPU.")
    return Check(title="NCCL", found=found)
