"""What matters to memory that processes share, on this machine."""

from __future__ import annotations

import os

from weight_transfer.authoring import Check, Verdict, check_gpus, check_torch

_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def checks() -> list[Check]:
    """Look at GPUs, at torch and at how it allocates."""
    return [check_gpus(), check_torch(), _check_allocator()]


def _check_allocator() -> Check:
    """Look whether torch is told to allocate memory that CUDA cannot export."""
    for variable in _VARIABLES:
        setting = os.environ.get(variable, "")
        if "expandable_segments:True" in setting or "backend:cudaMallocAsync" in setting:
            found = f"{variable}={setting}: CUDA cannot export that memory, so each byte is copied twice"
            fix = f"Take expandable_segments and backend:cudaMallocAsync out of {variable}."
            return Check(title="torch's allocator", verdict=Verdict.LIMITED, found=found, fix=fix)
    return Check(title="torch's allocator", found="does not keep CUDA memory from being exported")
