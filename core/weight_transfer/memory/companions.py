"""Tensors that refer to the same storage as a rank's shards though nobody gave them.

A storage can be adopted only with everything that refers to it (`weight_transfer.memory.export`). A shard is often a
view: its base is one more reference. FSDP2 keeps two for each parameter: the local tensor of the parameter itself, and
the flat, padded data that it sends into an all-gather.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch

_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param"


def companions_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the bases of tensors that are views, and what FSDP keeps of every parameter in this process.

    It looks at all objects of the process if it uses FSDP, so ask only when something is to be adopted.
    """
    found = [*tensors, *_kept_by_fsdp()]
    bases = (getattr(tensor, "_base", None) for tensor in found)
    return [*found, *(base for base in bases if base is not None)]


def _kept_by_fsdp() -> list[torch.Tensor]:
    module = sys.modules.get(_FSDP)
    kind: Any = getattr(module, "FSDPParam", None)
    if kind is None:
        return []
    params = [each for each in gc.get_objects() if type(each) is kind]
    found = []
    for param in params:
        flat = getattr(param, "_sharded_param_data", None)
        local = getattr(getattr(param, "sharded_param", None), "_local_tensor", None)
        found += [tensor for tensor in (flat, local) if isinstance(tensor, torch.Tensor)]
    return found
